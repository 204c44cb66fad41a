"""The aligned transformer: gradients, hooks, and its state after alignment ends."""

from __future__ import annotations

import pytest
import torch
from conftest import OpenTiny
from diffusers import ModelMixin
from torch import Tensor, nn

from crepa_cli.alignment import Crepa, TokenGrid
from crepa_cli.models.family import Family
from crepa_cli.training.aligned import AlignedTransformer, BlockPair

GRID = TokenGrid(frames=3, rows=4, columns=6)
TEACHER_GRID = TokenGrid(frames=3, rows=5, columns=5)


@pytest.fixture
def family(open_tiny: OpenTiny) -> Family:
    return open_tiny("wan", "t2v")


def aligned_transformer(
    family: Family, student_block: int = 8, teacher_block: int | None = None, layersync: BlockPair | None = None
) -> AlignedTransformer:
    torch.manual_seed(0)
    transformer = family.load_transformer(torch.float32).requires_grad_(True)
    crepa = Crepa(family.hidden_size, 20 if teacher_block is None else family.hidden_size)
    return AlignedTransformer(
        transformer,
        crepa,
        blocks=family.blocks(transformer),
        pair=BlockPair(student_block, teacher_block),
        layersync=layersync,
        row_major=family.row_major,
    ).train()


def inputs(family: Family) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    channels = family.config["in_channels"]
    return {
        "hidden_states": torch.randn(2, channels, 3, 8, 12, generator=generator),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 16, family.config["text_dim"], generator=generator),
    }


def features() -> Tensor:
    return torch.randn(2, 3, 25, 20, generator=torch.Generator().manual_seed(2))


def gradients(aligned: AlignedTransformer, family: Family) -> dict[str, Tensor]:
    encoder = () if aligned.pair.teacher is not None else (features(), TEACHER_GRID)
    output = aligned(inputs(family), GRID, *encoder)
    (output.prediction.pow(2).mean() + 0.5 * output.alignment.loss).backward()
    found = {name: parameter.grad for name, parameter in aligned.named_parameters() if parameter.grad is not None}
    aligned.zero_grad()
    return found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].norm().clamp(min=1e-6)
        assert (gradient - theirs[name]).norm() <= tolerance * scale, name


@pytest.mark.parametrize("teacher_block", [None, 10])
def test_gradients_are_the_same_with_activation_checkpointing(family: Family, teacher_block: int | None) -> None:
    plain = aligned_transformer(family, teacher_block=teacher_block)
    expected = gradients(plain, family)
    assert expected["crepa.projector.1.weight"].norm() > 0
    assert isinstance(plain.transformer, ModelMixin)
    plain.transformer.enable_gradient_checkpointing()
    assert_close(gradients(plain, family), expected, 1e-5)
    # The recomputation of the first backward must leave nothing for a second step to trip over.
    assert_close(gradients(plain, family), expected, 1e-5)


def test_alignment_reaches_the_aligned_block_and_those_before_it_alone(family: Family) -> None:
    aligned = aligned_transformer(family, student_block=4)
    aligned(inputs(family), GRID, features(), TEACHER_GRID).alignment.loss.backward()
    touched = [any(p.grad is not None for p in block.parameters()) for block in family.blocks(aligned.transformer)]
    assert touched == [True] * 5 + [False] * 7


def test_a_backbone_teacher_gets_no_gradient(family: Family) -> None:
    aligned = aligned_transformer(family, student_block=4, teacher_block=9)
    aligned(inputs(family), GRID).alignment.loss.backward()
    touched = [any(p.grad is not None for p in block.parameters()) for block in family.blocks(aligned.transformer)]
    assert touched == [True] * 5 + [False] * 7


def test_nothing_is_left_of_a_dropped_alignment(family: Family) -> None:
    aligned = aligned_transformer(family)
    bare = family.load_transformer(torch.float32)
    assert any(module._forward_hooks for module in aligned.modules())
    aligned.drop_alignment()
    assert not any(module._forward_hooks for module in aligned.modules())
    assert [name for name, _ in aligned.transformer.named_parameters()] == [name for name, _ in bare.named_parameters()]
    assert len(list(aligned.parameters())) == len(list(bare.parameters()))
    output = aligned(inputs(family), GRID)
    assert output.alignment is None
    assert torch.equal(output.prediction, bare(**inputs(family)).sample)


def test_layersync_goes_on_after_crepa(family: Family) -> None:
    aligned = aligned_transformer(family, layersync=BlockPair(3, 9))
    output = aligned(inputs(family), GRID, features(), TEACHER_GRID)
    with aligned.capture.recording() as states, torch.no_grad():
        aligned.transformer(**inputs(family))
    expected = -torch.cosine_similarity(states[3].double(), states[9].double(), dim=-1).mean()
    torch.testing.assert_close(output.layersync.double(), expected, rtol=1e-5, atol=1e-6)
    aligned.drop_alignment()
    output = aligned(inputs(family), GRID)
    assert output.alignment is None
    output.layersync.backward()
    touched = [any(p.grad is not None for p in block.parameters()) for block in family.blocks(aligned.transformer)]
    assert touched == [True] * 4 + [False] * 8


def test_accumulated_gradients_are_those_of_the_whole_batch(family: Family) -> None:
    aligned = aligned_transformer(family)
    expected = gradients(aligned, family)
    whole = inputs(family)
    for clip in range(2):
        part = {name: tensor[clip : clip + 1] for name, tensor in whole.items()}
        output = aligned(part, GRID, features()[clip : clip + 1], TEACHER_GRID)
        ((output.prediction.pow(2).mean() + 0.5 * output.alignment.loss) / 2).backward()
    found = {name: parameter.grad for name, parameter in aligned.named_parameters() if parameter.grad is not None}
    assert_close(found, expected, 1e-5)


# Wan keeps its norms in float32, whose fused kernel does not take bfloat16.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_bf16_autocast_keeps_the_loss_in_float32(family: Family) -> None:
    aligned = aligned_transformer(family)
    with torch.autocast("cpu", torch.bfloat16):
        output = aligned(inputs(family), GRID, features(), TEACHER_GRID)
    assert output.alignment is not None
    assert output.alignment.loss.dtype == torch.float32
    output.alignment.loss.backward()
    gradient = aligned.get_parameter("crepa.projector.1.weight").grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


# Dynamo looks at .grad of every input of a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_are_captured_and_let_go(family: Family) -> None:
    aligned = aligned_transformer(family)
    expected = gradients(aligned, family)
    for block in family.blocks(aligned.transformer):
        assert isinstance(block, nn.Module)
        block.forward = torch.compile(block.forward, backend="aot_eager")
    assert_close(gradients(aligned, family), expected, 1e-4)
    aligned.drop_alignment()
    assert aligned(inputs(family), GRID).alignment is None
