"""Spectral fine-tuning in PEFT's manner: train and store the chosen layers alone, load them with plain PEFT."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from hf_opentrans._optional import require

from .analysis import SpectralReport
from .gradients import Loss
from .layers import exactly, find_layers, matches
from .selection import LayerSelection, select_layers

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

MODES = ("full", "lora")


@dataclass(frozen=True)
class SpectralConfig:
    """Which layers get an adapter, and which kind of adapter.

    In mode "full" whole layers are trained and stored, as copies beside the frozen ones (PEFT's `LNTuningConfig`,
    which wraps any module); in mode "lora" they get low-rank adapters (PEFT's `LoraConfig`). Both are stock PEFT: the
    saved adapter loads with `PeftModel.from_pretrained`, without this package.

    Args:
        rule: One of `RULES`, see `select_layers`.
        fraction: Share of the layers that train, in (0, 1].
        granularity: "module" or "block".
        mode: "full" or "lora".
        target_modules: Which layers are there to choose from; a regular expression or names, as in PEFT. Defaults to
            all linear and convolution layers.
        exclude_modules: Which of these are not.
        modules_to_save: Other modules that train and are stored: norms, task heads. As in PEFT. In mode "full" PEFT's
            `merge_and_unload` leaves its wrapper around those that consist of several modules.
        lora: Options of `LoraConfig`, for mode "lora": r, lora_alpha, lora_dropout, ...
        seed: Of rule "random".

    Raises:
        ValueError: If a value is unknown or out of range.
    """

    rule: str = "alpha"
    fraction: float = 0.5
    granularity: str = "module"
    mode: str = "full"
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}. It must be one of {', '.join(MODES)}. Correct it.")
        if self.lora and self.mode != "lora":
            raise ValueError(
                f"lora is {dict(self.lora)} and mode is {self.mode!r}. Set mode='lora', or leave lora out."
            )
        names = {"target_modules", "exclude_modules", "modules_to_save"} & set(self.lora)
        if names:
            raise ValueError(
                f"lora holds {sorted(names)}. The selection sets them. Give them to SpectralConfig itself."
            )

    @property
    def base_model_name_or_path(self) -> NoReturn:
        """PEFT reads this first of a config: say what to do instead."""
        raise TypeError(
            "A SpectralConfig names no modules before it has seen the model. PEFT needs their names. Call "
            "hf_opentrans.get_peft_model(model, config), or peft.get_peft_model(model, config.resolve(model))."
        )

    def select(
        self,
        model: nn.Module,
        *,
        report: SpectralReport | None = None,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        pruning_report: Any = None,
    ) -> LayerSelection:
        """Choose the layers; the arguments are those of `select_layers`."""
        if any(name.endswith("base_layer") for name, _ in model.named_modules()):
            raise ValueError(
                f"The {type(model).__name__} has adapters already, and their copies are no layers to choose from. "
                "Select before the first adapter is added, and pass `selection`."
            )
        names = list(find_layers(model, self.target_modules, self.exclude_modules))
        exact = exactly(names)
        return select_layers(
            model if report is None else report,
            self.rule,
            self.fraction,
            self.granularity,
            target_modules=exact,
            seed=self.seed,
            batches=batches,
            loss=loss,
            pruning_report=pruning_report,
        )

    def resolve(self, model: nn.Module, selection: LayerSelection | None = None, **options: Any) -> "PeftConfig":
        """Return the stock PEFT config that names exactly the selected layers.

        Args:
            model: The model.
            selection: What was selected before. Defaults to `select(model, **options)`.
            options: For `select`.

        Raises:
            ImportError: If PEFT is not installed.
            ValueError: If the model has not all of the selection's layers; or see `select_layers`.
        """
        require("train", "peft")
        from peft import LNTuningConfig, LoraConfig

        chosen = self.select(model, **options) if selection is None else selection
        chosen.check(model)
        names, saved = list(chosen.names), list(self.modules_to_save or ())
        if self.mode == "lora":
            return LoraConfig(target_modules=exactly(names), modules_to_save=saved or None, **self.lora)
        more = {name: module for name, module in model.named_modules() if saved and matches(name, saved)}
        # Single modules are wrapped like the layers: `merge_and_unload` then leaves nothing of PEFT behind.
        nested = [
            name for name, module in more.items() if list(module.children()) and not hasattr(module, "base_layer")
        ]
        names += [name for name in more if name not in names and name not in nested]
        kept = [wanted for wanted in saved if any(matches(name, [wanted]) for name in nested)]
        return LNTuningConfig(target_modules=exactly(names), modules_to_save=kept or None)


def get_peft_model(
    model: nn.Module, config: "SpectralConfig | PeftConfig", adapter_name: str = "default", **options: Any
) -> "PeftModel":
    """Add an adapter on the layers that a `SpectralConfig` selects; any other config goes to PEFT as it is.

    The result is a stock `PeftModel`: `save_pretrained`, `print_trainable_parameters`, `disable_adapter`,
    `add_adapter`, `load_adapter`, `merge_and_unload` are PEFT's. A further adapter takes
    `config.resolve(model, selection)`; in mode "full" PEFT needs the same selection for all adapters of a model.

    Args:
        model: Changed in place, as PEFT does.
        config: What to train.
        adapter_name: Name of the adapter.
        options: For `SpectralConfig.resolve`: a `selection`, a `report`, `batches`, ...

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: See `SpectralConfig.resolve`.
    """
    require("train", "peft")
    import peft

    stock = config.resolve(model, **options) if isinstance(config, SpectralConfig) else config
    with warnings.catch_warnings():
        # PEFT asks for the sides of every module that it wraps, and norms have none. Copies need no sides.
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        found: Any = peft.get_peft_model(model, stock, adapter_name)  # pyright: ignore[reportArgumentType]
    return found
