"""Shares are never rounded up to a bar."""

from danceopd.report.names import percent


def test_a_share_below_the_bar_is_never_printed_as_the_bar():
    assert percent(0.94999) == "94.9 %"
    assert percent(0.95) == "95.0 %"
    assert percent(0.29) == "29.0 %"
    assert percent(1.0) == "100.0 %"
