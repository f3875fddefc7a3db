"""The tests that ``python -m bench`` has pytest run: one for each variant of each case, one for each counted table."""

from typing import Any

import pytest

from bench import engine, tables


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plugin = next(p for p in metafunc.config.pluginmanager.get_plugins() if isinstance(p, engine.Engine))
    if "name" in metafunc.fixturenames:
        plan = plugin.plan()
        ids = [f"{case.part}: {case.name}: {name}" for case, name in plan]
        metafunc.parametrize(("plugin", "case", "name"), [(plugin, *p) for p in plan], ids=ids)
    else:
        parts = [p for p in plugin.options.parts if p in tables.COUNTED]
        metafunc.parametrize(("plugin", "part"), [(plugin, p) for p in parts], ids=parts)


def test_table(plugin: Any, part: str) -> None:
    plugin.say(part)
    for counted in tables.COUNTED[part](plugin.options.device, plugin.options.quick):
        plugin.tables[part] = counted
        plugin.save()


@pytest.mark.benchmark(timer=engine.REPLAY)
def test_time(plugin: Any, case: Any, name: str, benchmark: Any) -> None:
    try:
        variant, times, figures = plugin.measured(case, name)
        benchmark.group = f"{case.part}: {case.name}"
        benchmark.extra_info.update(figures)
        if variant.missing:
            plugin.missing.append({"case": case.name, "variant": name, "reason": variant.missing})
            (pytest.fail if variant.failed else pytest.skip)(variant.missing)
        engine.replay(benchmark, times)
    finally:
        if plugin.is_last(case, name):
            plugin.save()
