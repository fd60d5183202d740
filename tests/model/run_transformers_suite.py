"""Run Transformers' own tests of a model with `fuse` applied to every model that they construct:

    python tests/model/run_transformers_suite.py CHECKOUT [bert roberta ...] [--unpad] [pytest's options]

CHECKOUT is a source tree of the installed version of Transformers (``git clone --branch v5.24.0``). The tests need the
packages that its README names, at least ``parameterized``. Our test run does not collect this file: it takes minutes.
docs/drop-in.md lists the results and the excluded tests.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest

EXCLUDED = {
    "test_attention_outputs": "sets config.output_attentions; Transformers allows this only with eager attention",
    "test_can_set_attention_dynamically": "asserts that the attention's name is 'sdpa', then 'eager'",
    "test_sdpa_can_dispatch_non_composite_models": "asserts that the attention's name is 'sdpa'",
}
# Also excluded with --unpad.
EXCLUDED_UNPAD = {
    "test_feed_forward_chunking": "also compares the rows of padding, which unpad sets to zero",
    **dict.fromkeys(  # slow: with RUN_SLOW=1
        ("test_torch_export_static", "test_torch_export_dynamic"),
        "also compare the rows of padding, which are zeros in eager mode but not in the exported graph",
    ),
}


class FuseEverything:
    """Fuses each Transformers model when its constructor returns, before from_pretrained loads weights."""

    def __init__(self, unpad: bool) -> None:
        self.unpad, self.fused = unpad, 0
        self.excluded = {**EXCLUDED, **EXCLUDED_UNPAD} if unpad else EXCLUDED

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        from transformers.modeling_utils import PreTrainedModel

        from fusebert.model.fusion import swap

        swap.kernels_run = lambda args, kwargs: True  # on a CPU the fused code runs too, on the reference
        plugin, depth = self, 0

        def constructor(cls: Any) -> Any:
            original = cls.__init__

            @functools.wraps(original)
            def __init__(model: Any, *args: Any, **kwargs: Any) -> None:
                nonlocal depth
                depth += 1
                try:
                    original(model, *args, **kwargs)
                finally:
                    depth -= 1
                if depth == 0:  # the whole model: not a part of it, not the constructor of a base class
                    plugin.fuse(model)

            return __init__

        def wrap(cls: Any) -> None:
            if "__init__" in vars(cls):
                cls.__init__ = constructor(cls)

        def __init_subclass__(cls: Any, **kwargs: Any) -> None:
            created.__func__(cls, **kwargs)
            wrap(cls)

        created: Any = PreTrainedModel.__init_subclass__
        PreTrainedModel.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]
        for cls in PreTrainedModel.__subclasses__():  # imported already
            wrap(cls)

    def fuse(self, model: Any) -> None:
        from fusebert.model import fuse

        self.fused += bool(fuse(model, unpad=self.unpad).replaced)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        excluded = [item for item in items if item.name.partition("[")[0] in self.excluded]
        config.hook.pytest_deselected(items=excluded)
        items[:] = [item for item in items if item not in excluded]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"{self.fused} models were fused; {len(self.excluded)} tests do not apply:")
        for name, reason in self.excluded.items():
            terminalreporter.write_line(f"  {name}: {reason}")


def main(words: list[str]) -> int:
    if not words or not (Path(words[0]) / "tests" / "test_modeling_common.py").is_file():
        sys.exit(__doc__)
    checkout, rest = Path(words[0]).resolve(), words[1:]
    names = [word for word in rest if not word.startswith("-")] or ["bert"]
    options = [word for word in rest if word.startswith("-") and word != "--unpad"]
    paths = [str(checkout / "tests" / "models" / name / f"test_modeling_{name}.py") for name in names]
    plugin = FuseEverything("--unpad" in rest)
    status = pytest.main([*paths, f"--rootdir={checkout}", "-p", "no:cacheprovider", "-q", *options], plugins=[plugin])
    return int(status) or int(plugin.fused == 0)  # a run without a fused model shows nothing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
