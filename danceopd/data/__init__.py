"""Training data. A data set of one capability is any object with this interface:

- `len(data)`: the number of samples;
- `data.has_source`: bool, whether its samples come with a source picture to edit;
- `data.prompts(indices)`: list[str];
- `data.columns(indices)`: list[dict[str, str]], what texts take from the samples, their prompt among it;
- `data.sources(indices)`: [n, 3, S, S] float32 in [-1, 1], or None without source pictures;
- `data.targets(indices)`: the same for the pictures asked for, or None where there are none.

`manifest.ManifestData` reads a user's own pictures, `world.WorldData` draws those of the picture world.
"""
