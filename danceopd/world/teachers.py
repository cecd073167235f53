"""Makes the sources of a run of embedded networks fields."""

from collections.abc import Callable, Mapping
from functools import cache

from danceopd.config.expressions import expression
from danceopd.config.sections import Config
from danceopd.core.expressions import Text
from danceopd.core.fields import Field, SharedField, guided
from danceopd.models.blocks import without_blocks
from danceopd.support.texts import columns_of
from danceopd.world.dit import DiT
from danceopd.world.tokenizer import tokenize


def source_fields(config: Config, networks: Mapping[str, DiT]) -> Callable[[str], Field]:
    """Makes any source of a run a field.

    Args:
        config: The run's.
        networks: Those of its sources that are networks, by name, on their device.

    Returns:
        The function of a source's name. What it makes asks one network in one forward.
    """
    some = next(iter(networks.values()))
    device = some.text_position.device

    def encoded(text: str):
        return tokenize([text], some.config.text_length)[0].to(device)

    @cache
    def asked(network: DiT, skipped: tuple[int, ...]) -> Field:
        return without_blocks(network, network, skipped) if skipped else network

    def leaf(name: str, skipped: tuple[int, ...] = ()) -> SharedField:
        field = asked(networks[name], skipped)
        return SharedField(field, guided(field, encoded("")), 0)

    @cache
    def text(name: str) -> Text:
        return Text(name, None if columns_of(name) else encoded(name))

    def field(name: str) -> Field:
        source = config.sources[name]
        if source.operator():
            return expression(config, name, leaf, text)
        network = asked(networks[name], ())
        if any(other.operator() for other in config.sources.values()):  # then it is a row of their forwards
            return SharedField(network, guided(network, encoded("")), 0, source.guidance_scale)
        return guided(network, encoded(""), source.guidance_scale)

    return field
