// From Python's values to the kernels' problems: an address is an integer, 0 for none.
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "problems.h"

namespace danceopd {

inline Format format_of(const std::string& name) {
    if (name == "float32") return Format::float32;
    if (name == "bfloat16") return Format::bfloat16;
    if (name == "float16") return Format::float16;
    throw std::invalid_argument("no compiled kernel for " + name);
}

class Values {
  public:
    explicit Values(const pybind11::dict& values) : values_(values) {}

    template <class T>
    T* address(const char* name) const {
        return reinterpret_cast<T*>(values_[name].cast<uintptr_t>());
    }

    template <class T>
    T number(const char* name) const {
        return values_[name].cast<T>();
    }

    int addresses(const char* name, const void* (&into)[MAX_TEACHERS]) const {
        int64_t numbers[MAX_TEACHERS];
        const int count = integers(name, numbers);
        for (int m = 0; m < MAX_TEACHERS; ++m) into[m] = reinterpret_cast<const void*>(numbers[m]);
        return count;
    }

    // How many a list holds, at most MAX_TEACHERS; what is missing becomes 0.
    int integers(const char* name, int64_t (&into)[MAX_TEACHERS]) const {
        int m = 0;
        for (const pybind11::handle one : values_[name].cast<pybind11::list>()) {
            if (m == MAX_TEACHERS) throw std::invalid_argument("too many teachers");
            into[m++] = one.cast<int64_t>();
        }
        for (int rest = m; rest < MAX_TEACHERS; ++rest) into[rest] = 0;
        return m;
    }

  private:
    const pybind11::dict& values_;
};

inline RoutedVelocityMse read(const pybind11::dict& values, RoutedVelocityMse*) {
    const Values v(values);
    RoutedVelocityMse p{};
    p.student = v.address<void>("student");
    p.count = v.addresses("teachers", p.teachers);
    v.addresses("uncond", p.uncond);
    v.integers("rows", p.rows);
    v.integers("uncond_rows", p.uncond_rows);
    p.guided = v.number<bool>("guided");
    p.norms = v.number<bool>("norms");
    p.route = v.address<int64_t>("route");
    p.row = v.address<int64_t>("row");
    p.uncond_row = v.address<int64_t>("uncond_row");
    p.guidance_scale = v.address<float>("guidance_scale");
    p.factor = v.address<float>("factor");
    p.mask = v.address<uint8_t>("mask");
    p.inner = v.number<int64_t>("inner");
    p.gradient = v.address<void>("gradient");
    p.sums = v.address<float>("sums");
    p.samples = v.number<int64_t>("samples");
    p.elements = v.number<int64_t>("elements");
    return p;
}

// Throws where a sample's row is not there; reads the host's memory.
inline void check(const RoutedVelocityMse& p) {
    const auto in_words = [](auto... part) {
        std::ostringstream words;
        (words << ... << part);
        return std::invalid_argument(words.str());
    };
    int64_t asked[MAX_TEACHERS] = {};
    for (int64_t i = 0; i < p.samples; ++i) {
        const int64_t m = p.route[i];
        if (m < 0 || m >= p.count) throw in_words("route of sample ", i, " is ", m, ", of ", p.count, " teachers");
        const int64_t row = p.row ? p.row[i] : asked[m]++;
        const int64_t uncond_row = p.uncond_row ? p.uncond_row[i] : row;
        if (row < 0 || row >= p.rows[m])
            throw in_words("row of sample ", i, " is ", row, ", of a tensor that holds ", p.rows[m], " rows");
        if (p.guided && (uncond_row < 0 || uncond_row >= p.uncond_rows[m]))
            throw in_words("uncond_row of sample ", i, " is ", uncond_row, ", of a tensor that holds ", p.uncond_rows[m],
                           " rows");
    }
}

template <class Problem>
void check(const Problem&) {}

inline Step read(const pybind11::dict& values, Step*) {
    const Values v(values);
    Step p{};
    p.z = v.address<void>("z");
    p.velocity = v.address<void>("velocity");
    p.uncond = v.address<void>("uncond");
    p.other = v.address<void>("other");
    p.other_uncond = v.address<void>("other_uncond");
    p.sigma = v.address<float>("sigma");
    p.next_sigma = v.address<float>("next_sigma");
    p.guidance_scale = v.address<float>("guidance_scale");
    p.active = v.address<uint8_t>("active");
    p.samples = v.number<int64_t>("samples");
    p.elements = v.number<int64_t>("elements");
    return p;
}

inline SdeStep read(const pybind11::dict& values, SdeStep*) {
    const Values v(values);
    SdeStep p{};
    p.z = v.address<void>("z");
    p.velocity = v.address<void>("velocity");
    p.noise = v.address<void>("noise");
    p.sigma = v.address<float>("sigma");
    p.next_sigma = v.address<float>("next_sigma");
    p.pole = v.address<float>("pole");
    p.noise_level = v.number<float>("noise_level");
    p.active = v.address<uint8_t>("active");
    p.sums = v.address<float>("sums");
    p.samples = v.number<int64_t>("samples");
    p.elements = v.number<int64_t>("elements");
    return p;
}

inline Quantize read(const pybind11::dict& values, Quantize*) {
    const Values v(values);
    Quantize p{};
    p.x = v.address<void>("x");
    p.scale = v.address<void>("scale");
    p.shift = v.address<void>("shift");
    p.rows_per_sample = v.number<int64_t>("rows_per_sample");
    p.norm = v.number<bool>("norm");
    p.eps = v.number<float>("eps");
    p.q = v.address<uint8_t>("q");
    p.row_scale = v.address<float>("row_scale");
    p.rows = v.number<int64_t>("rows");
    p.columns = v.number<int64_t>("columns");
    return p;
}

}  // namespace danceopd
