"""What vLLM, SGLang and LMDeploy do with a config.json and the names of a checkpoint, told from facts about them.

The facts are files of ``tests/fixtures/engines``: architectures that are registered, keys that are read, settings that
are supported, how names are renamed and stacked, and the parameters that are built. Nothing of the engines is imported.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Facts = Mapping[str, Any]


class Refused(Exception):
    """The engine does not load it."""


def load(
    engine: Facts,
    config: Mapping[str, Any],
    names: Iterable[str],
    *,
    constants: Mapping[str, int] | None = None,
) -> int:
    """Do as the engine does with the names of a checkpoint.

    Args:
        engine: its rules.
        config: config.json.
        names: of the tensors.
        constants: numbers that the engine has from elsewhere than config.json, where they are not the real ones.

    Returns:
        how many parameters were filled.

    Raises:
        Refused: the engine does not know the architecture or a setting, has no place for a name, or has a parameter
            of which the checkpoint holds nothing or only a part. Some engines pass over a bias that they have no place
            for; its answers would be others, so that is refused, too.
    """
    architecture = config['architectures'][0]
    if architecture not in engine['loaders']:
        raise Refused('not registered')
    loader = engine['loaders'][architecture]
    parameters = _parameters_of(engine, architecture, config, constants or {})
    numbers = _numbers_of(loader, config, constants or {})
    filled: dict[str, set[str]] = defaultdict(set)
    for name in names:
        place = _place_of(engine, architecture, config, name)
        if place is None or not _is_needed(place.parameter, loader, numbers):
            continue
        if place.parameter in parameters:
            filled[place.parameter].add(place.part)
        else:
            raise Refused(f'no parameter {place.parameter} for {name}')
    for parameter in sorted(parameters):
        if parameter not in filled and not parameter.startswith(tuple(loader.get('unused', ()))):
            raise Refused(f'nothing for {parameter}')
    _check_stacks(filled)
    return len(filled)


class _Place(NamedTuple):
    """What a loader says of a name: the parameter it goes into, and as which part of it."""

    parameter: str
    part: str = ''


def _value_of(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where it is not there."""
    found: Any = config
    for name in key.split('.') if key else ():
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _find_child(engine: Facts, rule: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, Any]:
    """Architecture and config of a model inside the model."""
    inner = _value_of(config, rule['config']) or config  # early configs of transformers had no text_config
    by_type = rule.get('by_model_type', {}).get(inner.get('model_type'))
    architecture = rule.get('architecture') or by_type or (inner.get('architectures') or ['?'])[0]
    if architecture not in rule.get('architectures', engine['loaders']) or architecture not in engine['loaders']:
        raise Refused(f'no language model {architecture}')
    return architecture, {'tie_word_embeddings': config.get('tie_word_embeddings', False), **inner}


def _check_config(loader: Facts, config: Mapping[str, Any]) -> None:
    for key, allowed in loader.get('only', {}).items():
        found = _value_of(config, key)
        if found not in allowed and not (found is None and False in allowed):
            raise Refused(f'{key} is {found}, expected {" or ".join(map(str, allowed))}')
    for key in loader.get('absent', ()):
        if _value_of(config, key) is not None:
            raise Refused(f'{key} is {_value_of(config, key)}, expected none')
    missing = [key for key in loader['config'] if all(_value_of(config, name) is None for name in key.split('|'))]
    if missing:
        raise Refused(f'config.json lacks {missing[0]}')


def _expand(pattern: str, numbers: Mapping[str, int]) -> Iterable[str]:
    """``layers.{num_hidden_layers}.x``: a name for each of so many layers."""
    found = re.search(r'\{([^}]+)\}', pattern)
    if found is None:
        return [pattern]
    return [pattern.replace(found[0], str(i)) for i in range(numbers[found[1]])]


def _numbers_of(loader: Facts, config: Mapping[str, Any], constants: Mapping[str, int]) -> dict[str, int]:
    sections = {'': config, **{f'{k}.': v for k, v in config.items() if isinstance(v, Mapping)}}
    numbers = {f'{s}{k}': v for s, section in sections.items() for k, v in section.items() if isinstance(v, int)}
    if 'vision_feature_layer' in config:
        depth, layer = numbers['vision_config.num_hidden_layers'], config['vision_feature_layer']
        used = depth + 1 + layer if layer < 0 else layer
        numbers['clip_layers'] = used if 'cut_at_feature_layer' in loader else depth
    return {**numbers, **loader.get('constants', {}), **constants}


def _is_needed(name: str, loader: Facts, numbers: Mapping[str, int]) -> bool:
    """Whether a loader passes over a name because the model does without it."""
    if name.startswith(tuple(loader.get('unneeded', ()))):
        return False
    start = loader.get('cut_at_feature_layer')
    return not (
        start and name.startswith(start) and int(name.removeprefix(start).partition('.')[0]) >= numbers['clip_layers']
    )


def _parameters_of(
    engine: Facts, architecture: str, config: Mapping[str, Any], constants: Mapping[str, int]
) -> set[str]:
    """The names of all parameters that the engine builds for a config.json."""
    loader = engine['loaders'][architecture]
    _check_config(loader, config)
    patterns = list(loader['parameters'])
    for rule in loader.get('where', ()):
        patterns += rule['parameters'] if _value_of(config, rule['key']) == rule['value'] else []
    names = {name for p in patterns for name in _expand(p, _numbers_of(loader, config, constants))}
    if config.get('tie_word_embeddings'):
        names -= set(loader.get('tied', ()))
    for prefix, rule in loader.get('children', {}).items():
        child, inner = _find_child(engine, rule, config)
        names |= {prefix + name for name in _parameters_of(engine, child, inner, constants)}
    return names


def _place_of(engine: Facts, architecture: str, config: Mapping[str, Any], name: str) -> _Place | None:
    """Where the loader puts a tensor of the checkpoint; None: it leaves it out."""
    loader = engine['loaders'][architecture]
    if any(part in name for part in engine['ignored']):
        return None
    for old, new in loader.get('rename', ()):
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    stacked = loader.get('stacked', {})
    for prefix, rule in loader.get('children', {}).items():
        child, inner = _find_child(engine, rule, config)
        if _tied_away(engine, loader, child, inner, name.removeprefix(prefix)):
            return None
        if engine['delegates'] and prefix and name.startswith(prefix):
            place = _place_of(engine, child, inner, name.removeprefix(prefix))
            return None if place is None else place._replace(parameter=prefix + place.parameter)
        stacked = engine['loaders'][child].get('stacked', {}) if stacked == 'of child' else stacked
    if _tied_away(engine, loader, architecture, config, name):
        return None
    for part, whole in stacked.items():
        if part in name:
            return _Place(name.replace(part, whole), part)
    for rule in loader.get('replace', ()):
        name = name.replace(rule['old'], rule['new']) if rule['within'] in name else name
    return _Place(name)


def _tied_away(engine: Facts, loader: Facts, child: str, config: Mapping[str, Any], name: str) -> bool:
    """Whether a second name of a tied weight stands in the checkpoint, and the loader passes over it."""
    how = loader.get('tied_in_checkpoint', engine['tied'])
    tied = engine['loaders'][child].get('tied', ())
    return how == 'skipped' and bool(config.get('tie_word_embeddings')) and name in tied


def _check_stacks(filled: Mapping[str, set[str]]) -> None:
    """A parameter that several tensors make up has all of them."""
    kinds = ({'q_proj', 'k_proj', 'v_proj'}, {'gate_proj', 'up_proj'}, {'w1', 'w3'}, {''})
    for parameter, parts in filled.items():
        if {part.removeprefix('.') for part in parts} not in kinds:
            raise Refused(f'only {sorted(parts)} for {parameter}')
