"""What the exact savings bring: paired times with and without work that nothing reads, outputs compared bit by bit."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from hf_opentrans.benchmark_rows import RowFile, duration
from hf_opentrans.benchmarks import vit_config
from hf_opentrans.models.clipseg_prompts import clipseg_logits
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPConfig
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_open_vocabulary import READS
from hf_opentrans.pruning.hosts import HostTower
from hf_opentrans.pruning.latency_timing import milliseconds
from hf_opentrans.pruning.macs import count_macs
from hf_opentrans.pruning.unused import drop_unused

REDUCED_MODES = ("clearclip", "naclip", "maskclip")
PROMPTS = (2, 20)
WARMUP = 1
LAST_MLP, PROJECTIONS, BLOCKS, IMAGE_PASSES = "last MLP", "projections", "blocks", "image passes"
# Time of a pass over that of its multiply-accumulates as one matrix product. For the forecast alone.
SLOWER = 1.2
# Most that the ratios of wall and of CPU times may differ by on a machine with nothing else to do.
DISTURBED = 1.1


@dataclass(frozen=True)
class CutSizes:
    """Sizes of the towers.

    Args:
        base, large: Hidden size, MLP width, layers, patch.
        dense, clipseg, llava: Sides of the images in pixels.
        clipseg_native: Side that CLIPSeg's positions are made for.
        text: Hidden size, MLP width, layers, heads, vocabulary of CLIPSeg's text tower.
        tokens: Tokens of a prompt.
    """

    base: tuple[int, int, int, int]
    large: tuple[int, int, int, int]
    dense: int
    clipseg: int
    llava: int
    clipseg_native: int
    text: tuple[int, int, int, int, int]
    tokens: int = 8


# CLIP ViT-B/16, CLIPSeg rd64-refined and LLaVA-1.5's ViT-L/14 at 336.
REAL = CutSizes((768, 3072, 12, 16), (1024, 4096, 24, 14), 336, 352, 336, 224, (512, 2048, 12, 8, 49408))


@dataclass(frozen=True)
class Pair:
    """Two ways to one result.

    Args:
        before, after: What is timed.
        params_before, params_after: Parameters of the vision tower.
        dropped: What `after` does without.
    """

    before: Callable[[], torch.Tensor]
    after: Callable[[], torch.Tensor]
    params_before: int
    params_after: int
    dropped: str


@dataclass(frozen=True)
class CutRow:
    """One saving.

    Args:
        what: Kind of the saving.
        case: Model, mode and size.
        ms_before, ms_after: Median times in milliseconds.
        speed_up: Median over rounds of time before / time after.
        quartiles: Of these ratios, first and third.
        cpu_speed_up: The same ratio of CPU times, of all threads together: far from `speed_up` where other work
            took the processor away.
        params_before, params_after: Of the vision tower.
        dropped: What was left out.
        is_equal: Whether both outputs are equal bit for bit.
        difference: Largest difference of the outputs over the largest value.
        rounds, threads: Of the timing.
    """

    what: str
    case: str
    ms_before: float
    ms_after: float
    speed_up: float
    quartiles: tuple[float, float]
    cpu_speed_up: float
    params_before: int
    params_after: int
    dropped: str
    is_equal: bool
    difference: float
    rounds: int
    threads: int

    @property
    def is_disturbed(self) -> bool:
        """Whether wall time and CPU time tell different stories."""
        return not 1 / DISTURBED < self.speed_up / self.cpu_speed_up < DISTURBED

    @property
    def key(self) -> tuple[str, str]:
        """What tells this row from the others of its file."""
        return self.what, self.case

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


class CutFile(RowFile[CutRow]):
    """The rows of `benchmark cuts`; see `RowFile`."""

    row_type, written_by = CutRow, "benchmark cuts"


@dataclass(frozen=True)
class CutCase:
    """A row that is still to be measured.

    Args:
        what, case: See `CutRow`.
        macs: Multiply-accumulates of one pass before and one after, for the forecast.
        build: Makes the models.
    """

    what: str
    case: str
    macs: float
    build: Callable[[], Pair]


def plan_cuts(sizes: CutSizes = REAL) -> list[CutCase]:
    """List what is measured."""
    dense, clipseg, llava = (
        count_macs(vit_config(*shape, image_size=side), resolution=side)
        for shape, side in ((sizes.base, sizes.dense), (sizes.base, sizes.clipseg), (sizes.large, sizes.llava))
    )
    vit = f"ViT, {sizes.base[2]} blocks, patch {sizes.base[3]}, {sizes.dense} px"
    cases = [
        CutCase(what, f"{mode}: {vit}", 2.0 * dense, partial(build, sizes, mode))
        for what, build in ((LAST_MLP, last_mlp_pair), (PROJECTIONS, projections_pair))
        for mode in REDUCED_MODES
    ]
    side = f"{sizes.clipseg} px"
    cases.append(CutCase(BLOCKS, f"CLIPSeg, 1 prompt, {side}", 2.0 * clipseg, partial(clipseg_blocks_pair, sizes)))
    cases += [
        CutCase(
            IMAGE_PASSES,
            f"CLIPSeg, {count} prompts, {side}",
            (count + 1.0) * clipseg,
            partial(prompts_pair, sizes, count),
        )
        for count in PROMPTS
    ]
    name = f"LLaVA, image side, {sizes.large[2]} blocks, patch {sizes.large[3]}, {sizes.llava} px"
    return [*cases, CutCase(BLOCKS, name, 2.0 * llava, partial(llava_pair, sizes))]


def _dense(sizes: CutSizes, mode: str) -> tuple[DenseCLIPForSegmentation, torch.Tensor]:
    vision = vit_config(*sizes.base, image_size=sizes.dense, projection_dim=512).to_dict()
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    values: Any = {"text_config": text, "vision_config": vision, "projection_dim": 512, "segmentation_mode": mode}
    torch.manual_seed(0)
    return DenseCLIPForSegmentation(SparseCLIPConfig(**values)).eval(), _pixels(sizes.dense)


def _pixels(side: int) -> torch.Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def last_mlp_pair(sizes: CutSizes, mode: str) -> Pair:
    """Pair a segmenter that runs the last block's MLP, as code around a stock tower does, with one that lacks it."""
    model, pixels = _dense(sizes, mode)
    cut = copy.deepcopy(model)
    (dropped,) = drop_unused(cut)
    last_block, layer = model._last_block, model._layers[-1]

    def with_mlp(hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        attended = last_block(hidden, *arguments)
        layer.mlp(layer.layer_norm2(hidden + attended))
        return attended

    cast("Any", model)._last_block = with_mlp
    return Pair(
        lambda: cast("torch.Tensor", model(pixels).dense_embeds),
        lambda: cast("torch.Tensor", cut(pixels).dense_embeds),
        dropped.of_params,
        dropped.of_params - dropped.params,
        "MLP of the last block",
    )


def projections_pair(sizes: CutSizes, mode: str) -> Pair:
    """Pair a segmenter that computes queries, keys and values in its last block with one that computes what it reads.

    Nothing is dropped from the weights: another mode may read it.
    """
    model, pixels = _dense(sizes, mode)
    lean = copy.deepcopy(model)
    attention = model._layers[-1].self_attn
    project = attention.project

    def project_all(hidden: torch.Tensor, parts: str) -> tuple[torch.Tensor, ...]:
        found = dict(zip("qkv", project(hidden), strict=True))
        return tuple(found[part] for part in parts)

    cast("Any", attention).project = project_all
    names = {"q": "queries", "k": "keys", "v": "values"}
    unread = " and ".join(name for part, name in names.items() if part not in READS[mode])
    params = _count(model.vision_model)
    return Pair(
        lambda: cast("torch.Tensor", model(pixels).dense_embeds),
        lambda: cast("torch.Tensor", lean(pixels).dense_embeds),
        params,
        params,
        f"{unread} of the last block",
    )


def _clipseg(sizes: CutSizes, prompts: int) -> tuple[CLIPSegForImageSegmentation, torch.Tensor, torch.Tensor]:
    """Return a model of rd64-refined's shape, one image, and the tokens of some prompts."""
    hidden, neurons, layers, heads, words = sizes.text
    text = {"hidden_size": hidden, "intermediate_size": neurons, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1}
    vision = vit_config(*sizes.base, image_size=sizes.clipseg_native).to_dict()
    options: dict[str, Any] = {"reduce_dim": 64, "use_complex_transposed_convolution": True}
    torch.manual_seed(0)
    # Read from one dictionary: the class names its parts in more than one way.
    values: Any = {"text_config": text, "vision_config": vision, "projection_dim": 512, **options}
    model = CLIPSegForImageSegmentation(CLIPSegConfig(**values)).eval()
    ids = torch.randint(0, words - 2, (prompts, sizes.tokens))
    ids[:, 0], ids[:, -1] = words - 2, words - 1
    return model, _pixels(sizes.clipseg), ids


def clipseg_blocks_pair(sizes: CutSizes) -> Pair:
    """Pair CLIPSeg with the same without the blocks above the deepest one that its decoder reads."""
    model, pixels, ids = _clipseg(sizes, 1)
    cut = copy.deepcopy(model)
    return _blocks_pair(
        (model, lambda: model(ids, pixels).logits),
        (cut, lambda: cut(ids, pixels).logits),
    )


def prompts_pair(sizes: CutSizes, prompts: int) -> Pair:
    """Pair stock CLIPSeg, which takes the image once per prompt, with one image pass for all prompts."""
    model, pixels, ids = _clipseg(sizes, prompts)
    params = _count(model.clip.vision_model)
    return Pair(
        lambda: model(ids, pixels.expand(prompts, -1, -1, -1)).logits,
        lambda: clipseg_logits(model, pixels, ids)[0],
        params,
        params,
        f"{prompts - 1} of {prompts} image passes",
    )


def llava_pair(sizes: CutSizes) -> Pair:
    """Pair LLaVA's image side with the same without the blocks above `vision_feature_layer`."""
    vision = vit_config(*sizes.large, image_size=sizes.llava).to_dict() | {"model_type": "clip_vision_model"}
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).eval()
    cut, pixels = copy.deepcopy(model), _pixels(sizes.llava)

    def features(host: LlavaForConditionalGeneration) -> torch.Tensor:
        return torch.stack(list(cast("Any", host.get_image_features(pixels)).pooler_output))

    return _blocks_pair((model, lambda: features(model)), (cut, lambda: features(cut)))


def _blocks_pair(
    before: tuple[PreTrainedModel, Callable[[], torch.Tensor]], after: tuple[PreTrainedModel, Callable[[], Any]]
) -> Pair:
    """Drop from the second model what it never reads."""
    depth = len(HostTower.of(before[0]).layers)
    (dropped,) = drop_unused(after[0])
    params = dropped.of_params, dropped.of_params - dropped.params
    return Pair(before[1], after[1], *params, f"{dropped.blocks} of {depth} blocks")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def measure(case: CutCase, rounds: int) -> CutRow:
    """Compare both outputs, then time both in turn, A B B A ..., so that neither always comes first."""
    pair = case.build()
    one, other = pair.before(), pair.after()
    scale = max(float(one.abs().max()), torch.finfo(one.dtype).tiny)
    wall: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    for index in range(WARMUP + rounds):
        for which in (0, 1) if index % 2 else (1, 0):
            start = time.process_time()
            elapsed = milliseconds(pair.after if which else pair.before, one.device)
            if index >= WARMUP:
                wall[which].append(elapsed)
                cpu[which].append(time.process_time() - start)
    ratios = _ratios(wall)
    quarters = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    return CutRow(
        case.what,
        case.case,
        *(statistics.median(measured) for measured in wall),
        speed_up=statistics.median(ratios),
        quartiles=(quarters[0], quarters[2]),
        cpu_speed_up=statistics.median(_ratios(cpu)),
        params_before=pair.params_before,
        params_after=pair.params_after,
        dropped=pair.dropped,
        is_equal=torch.equal(one, other),
        difference=float((one - other).abs().max()) / scale,
        rounds=rounds,
        threads=torch.get_num_threads(),
    )


def _ratios(times: tuple[list[float], list[float]]) -> list[float]:
    tick = 1e-9  # a CPU clock may stand still during a very short pass
    return [max(before, tick) / max(after, tick) for before, after in zip(*times, strict=True)]


def forecast(cases: Sequence[CutCase], rounds: int) -> float:
    """Return about how many seconds the cases will take, from the speed of a matrix product on this machine."""
    square = torch.randn(1024, 1024)
    torch.mm(square, square)
    start = time.perf_counter()
    for _ in range(3):
        torch.mm(square, square)
    per_mac = (time.perf_counter() - start) / (3 * 1024**3)
    return SLOWER * per_mac * sum(case.macs for case in cases) * (1 + WARMUP + rounds)


def run_cuts(
    cases: Sequence[CutCase], rounds: int, results: CutFile, *, say: Callable[[str], None] = lambda line: None
) -> None:
    """Measure all cases that `results` does not hold yet.

    Args:
        cases: What to measure.
        rounds: Paired rounds.
        results: Takes the rows.
        say: Called with a line before and after every case.
    """
    done = {row.key for row in results.rows}
    left = [case for case in cases if (case.what, case.case) not in done]
    about = f", about {duration(forecast(left, rounds))}. Nothing else should run meanwhile" if left else ""
    say(f"{len(cases)} rows: {len(cases) - len(left)} in the file already, {len(left)} to do{about}.")
    for index, case in enumerate(left, 1):
        row = measure(case, rounds)
        results.add(row)
        more = f"; about {duration(forecast(left[index:], rounds))} left" if index < len(left) else ""
        say(f"{index} of {len(left)}: {row.what}, {row.case}: {row.speed_up:.2f}x, {_equality(row)}{more}.")
    results.save(at_end=True)


def cuts_table(rows: Sequence[CutRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells."""
    header = ["without", "case", "before", "after", "speed-up (quartiles)", "CPU", "tower before / after", "output"]
    return header, list(_cells(rows))


def _cells(rows: Sequence[CutRow]) -> Iterator[list[str]]:
    for row in rows:
        low, high = row.quartiles
        yield [
            row.dropped,
            row.case,
            f"{row.ms_before:,.0f} ms" if row.ms_before >= 100 else f"{row.ms_before:.1f} ms",
            f"{row.ms_after:,.0f} ms" if row.ms_after >= 100 else f"{row.ms_after:.1f} ms",
            f"{row.speed_up:.2f}x ({low:.2f}-{high:.2f})" + "!" * row.is_disturbed,
            f"{row.cpu_speed_up:.2f}x",
            f"{row.params_before / 1e6:.1f} / {row.params_after / 1e6:.1f} M",
            _equality(row),
        ]


def _equality(row: CutRow) -> str:
    return "bit-equal" if row.is_equal else f"differs by {row.difference:.0e}"


def cuts_notes(rows: Sequence[CutRow]) -> list[str]:
    """Return the sentences that belong under the table."""
    counts = sorted({row.rounds for row in rows})
    notes = [
        f"Random weights; medians over {'/'.join(map(str, counts))} paired, interleaved rounds. "
        "CPU: the same ratio of CPU times."
    ]
    disturbed = sum(row.is_disturbed for row in rows)
    if disturbed:
        notes.append(
            f"!: in {disturbed} of {len(rows)} rows wall and CPU time differ by more than {DISTURBED - 1:.0%}: other "
            "work ran meanwhile. Measure them again on an idle machine."
        )
    if any(row.what in (LAST_MLP, PROJECTIONS) for row in rows):
        notes.append(
            "Segmenters: 'before' computes what the mode does not read, as code around a stock tower does. "
            "DenseCLIPForSegmentation never does; dropping the MLP saves it memory alone."
        )
    if not all(row.is_equal for row in rows):
        notes.append(
            "Differences are the largest over the largest value of the output; matrix products of another batch size "
            "round otherwise."
        )
    return notes
