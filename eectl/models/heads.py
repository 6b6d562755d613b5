"""Exit heads, which turn a block's Feature into logits. They take their widths from an example Feature and know no layout."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from eectl.core.errors import EectlError, lookup
from eectl.models.backbone import Feature
from eectl.models.pooling import mix_pools, pool_grid
from eectl.recipe.choices import HEAD_CHOICES, MOST_IN_A_NAME, in_order, number_in


@dataclass(frozen=True)
class ExitOutput:
    """An exit's output.

    Attributes:
        logits: [row, class].
        state: what later exits read of it, [row, …]; None where no head does.
        guesses: the states that it predicts for the later exits, [row, later exit, …]; None where its head predicts none.
    """

    logits: Tensor
    state: Tensor | None = None
    guesses: Tensor | None = None


class ExitHead(nn.Module, ABC):
    """An exit's classifier, in two steps: `reads` picks from a feature without parameters, `says` computes logits from that.

    What all heads read of a frozen backbone can so be kept, and the backbone need not run again.

    Attributes:
        uses_earlier: whether it reads the outputs of the exits before it.
        default_weights: the weighting of such exits' losses that `loss_weights: auto` stands for.
        auxiliary: the loss term that such heads add, an entry of losses.AUXILIARY; None: none.
        ensemble: the ensembles that such heads can have, an entry of ensembles.ENSEMBLES; None: none.
        kind: what a recipe calls it, such as mlp-1024.
    """

    uses_earlier: ClassVar[bool] = False
    default_weights: ClassVar[str] = "uniform"
    auxiliary: ClassVar[str | None] = None
    ensemble: ClassVar[str | None] = None
    kind: str = ""

    @abstractmethod
    def reads(self, feature: Feature) -> Tensor:
        """Return all that the head needs of a block's feature, [row, …]: small, and with no parameter of its own in it."""

    @abstractmethod
    def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        """Return the exit's output from what `reads` returned and the outputs of the exits before this one."""

    def forward(self, feature: Feature, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        """Return the exit's output from a block's feature and the outputs of the exits before this one."""
        return self.says(self.reads(feature), earlier)

    def join(self, peers: "Sequence[ExitHead]", number: int) -> None:
        """Prepare to be exit `number` (from 1) of the attached exits `peers`, and make the layers that this place needs.

        Called again for the same place it changes no weight. A head that keeps its peers keeps them in a tuple, which does not
        register them as its submodules. Raises EectlError where such exits do not go together.
        """


class LinearHead(ExitHead):
    """Class token (or the mean, where there is none) → Linear, with no norm before it: the paper's standard ViT head."""

    def __init__(self, feature: Feature, num_outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(feature.cls().shape[1], num_outputs)

    def reads(self, feature: Feature) -> Tensor:
        return feature.cls()

    def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:  # noqa: ARG002
        return ExitOutput(self.fc(read))


class MlpHead(ExitHead):
    """Class token (or the mean) → Linear → GELU → Linear: the paper's two-layer ViT head (1024 or 2048 wide)."""

    def __init__(self, feature: Feature, num_outputs: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feature.cls().shape[1], width)
        self.fc2 = nn.Linear(width, num_outputs)

    def reads(self, feature: Feature) -> Tensor:
        return feature.cls()

    def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:  # noqa: ARG002
        return ExitOutput(self.fc2(functional.gelu(self.fc1(read))))


class SdnHead(ExitHead):
    """Shallow-Deep Networks' head (Kaya et al., 2019): a · max + (1 − a) · mean over a 4×4 grid of the map → Linear.

    a is learnt, starts in U(0, 1) and is not clamped. Pooling is adaptive: of a map smaller than 4×4 cells are repeated.
    """

    def __init__(self, feature: Feature, num_outputs: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(()))
        self.fc = nn.Linear(16 * feature.map().shape[1], num_outputs)

    def reads(self, feature: Feature) -> Tensor:
        return pool_grid(feature.map())

    def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:  # noqa: ARG002
        return ExitOutput(self.fc(mix_pools(read, self.mix)))


class ZtwHead(ExitHead):
    """Zero Time Waste's cascade (Wołczyk et al., 2021): Linear on the features and LayerNorm(the logits of the exit before).

    The features are SDN's pooling of a convolutional map, and the class token (or the mean) of anything else. The logits are
    those of the earlier head itself, detached; the first exit has none to read. `state` is this head's own logits, which stay
    what they are when an ensemble replaces the exit's logits.
    """

    uses_earlier = True
    ensemble = "geometric"

    def __init__(self, feature: Feature, num_outputs: int) -> None:
        super().__init__()
        if num_outputs == 1:
            raise EectlError("exit head ztw combines class probabilities, and this network has one output; take another head")
        self.mix = nn.Parameter(torch.rand(())) if feature.is_map else None
        self.fc = nn.Linear(self._features(self.reads(feature)).shape[1], num_outputs)
        self.norm: nn.LayerNorm | None = None

    def join(self, peers: Sequence[ExitHead], number: int) -> None:  # noqa: ARG002
        if number > 1 and self.norm is None:
            num_outputs = self.fc.out_features
            self.norm = nn.LayerNorm(num_outputs)
            self.fc = nn.Linear(self.fc.in_features + num_outputs, num_outputs)

    def _features(self, read: Tensor) -> Tensor:
        return read if self.mix is None else mix_pools(read, self.mix)

    def reads(self, feature: Feature) -> Tensor:
        return feature.cls() if self.mix is None else pool_grid(feature.map())

    def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        x = self._features(read)
        if self.norm is not None:
            before = earlier[-1]
            assert before is not None and before.state is not None, "exits that read earlier ones run after them"
            x = torch.cat((x, self.norm(before.state.detach())), dim=1)
        logits = self.fc(x)
        return ExitOutput(logits, state=logits)


class ArithmeticZtwHead(ZtwHead):
    """ZTW's cascade for ensembles that are weighted means of probabilities instead of log-probabilities."""

    ensemble = "arithmetic"


class GpfHead(ExitHead):
    """Global Past-Future (Liao et al., 2021), as kamadforge/early-exit-benchmark has it.

    Its logits use the states of all earlier exits, and predictions of the states of all later ones.

    Exit k's state is s_k = φ(Linear(class token, or the mean: on a convolutional map too)), `width` wide. Imitator j predicts the
    state of exit j from that of any exit before it, ŝ_j = φ(Linear_j(s_k)). With λ = sigmoid(Linear(φ(mean of G_j s_j, j ≤ k))),

        logits = λ · Σ_{j ≤ k} A_j s_j + (1 − λ) · Σ_{j > k} A_j ŝ_j

    where φ is ReLU and the states of earlier exits are detached. Head j owns A_j, G_j and imitator j; head 1, which no exit
    predicts, owns λ's Linear, which all share. So an exit's logits also change with the later heads. States have no dropout.
    """

    uses_earlier = True
    default_weights = "linear"
    auxiliary = "imitation"

    def __init__(self, feature: Feature, num_outputs: int, width: int | None = None) -> None:
        super().__init__()
        features = feature.cls().shape[1]
        width = self._width(features) if width is None else width
        self.project = self._linear(features, width)
        self.reduce = self._linear(width, num_outputs, std=width**-0.5)
        self.gate = self._linear(width, num_outputs, std=width**-0.5)
        self.imitate: nn.Linear | None = None
        self.balance: nn.Linear | None = None
        self._peers: tuple[GpfHead, ...] = ()
        self._index = 0

    def _width(self, features: int) -> int:  # noqa: ARG002
        """Return the width of states for a kind that names none, such as gpf."""
        return 512

    def _linear(self, inputs: int, outputs: int, *, std: float | None = None) -> nn.Linear:
        """Return a layer with weights in N(0, std) and biases 0; default: as PyTorch draws them."""
        layer = nn.Linear(inputs, outputs)
        if std is not None:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        return layer

    def squash(self, x: Tensor) -> Tensor:
        """Return φ(x)."""
        return functional.relu(x)

    def merge(self, share: Tensor, known: Tensor, foreseen: Tensor) -> Tensor:
        """Return logits from λ and the sums over known and predicted states, all [row, class]."""
        return share * known + (1 - share) * foreseen

    def join(self, peers: Sequence[ExitHead], number: int) -> None:
        alike = [peer for peer in peers if type(peer) is type(self)]
        if len(peers) < 2:
            raise EectlError(f"exit head {self.kind or 'gpf'} foresees later exits and needs two attached exits; attach more")
        width = self.reduce.in_features
        if len(alike) < len(peers) or any(peer.reduce.in_features != width for peer in alike):
            widths = ", ".join(str(peer.reduce.in_features) for peer in alike)
            raise EectlError(
                f"exit head {self.kind or 'gpf'}: all attached exits must be of this kind with states of one width (they are "
                f"{widths} wide); name a width, such as gpf-64 or gpf-lancopku-64"
            )
        self._peers, self._index = tuple(alike), number - 1
        if number == 1 and self.balance is None:
            self.balance = self._linear(self.reduce.out_features, self.reduce.out_features)
        elif number > 1 and self.imitate is None:
            self.imitate = self._linear(width, width)

    def guess(self, state: Tensor) -> Tensor:
        """Predict this exit's state from an earlier exit's `state`, both [row, width]."""
        assert self.imitate is not None
        return self.squash(self.imitate(state))

    def reads(self, feature: Feature) -> Tensor:
        return feature.cls()

    def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        state = self.squash(self.project(read))
        past = [output.state.detach() for output in earlier if output is not None and output.state is not None]
        assert len(past) == self._index, "exits that read earlier ones run after them"
        later = self._peers[self._index + 1 :]
        guesses = [peer.guess(state) for peer in later]
        so_far = list(zip(self._peers, [*past, state], strict=False))
        gate = torch.stack([peer.gate(each) for peer, each in so_far]).mean(dim=0)
        balance = self._peers[0].balance
        assert balance is not None
        known = torch.stack([peer.reduce(each) for peer, each in so_far]).sum(dim=0)
        foreseen = [peer.reduce(guess) for peer, guess in zip(later, guesses, strict=True)] or [torch.zeros_like(known)]
        logits = self.merge(torch.sigmoid(balance(self.squash(gate))), known, torch.stack(foreseen).sum(dim=0))
        return ExitOutput(logits, state, torch.stack(guesses, dim=1) if guesses else None)


class LancopkuGpfHead(GpfHead):
    """GPF as its authors' lancopku/Early-Exit has it: φ is tanh, and logits are 2λ · known + (2 − 2λ) · predicted.

    States are as wide as the features where the kind names no width. Weights start in N(0, 0.02) and biases at 0, as BERT's. The
    loss is half of the sum of the exits' loss and the imitation loss. Left out: dropout on states, and the random cuts of
    gradients below the lower layers.
    """

    auxiliary = "imitation-halved"

    def _width(self, features: int) -> int:
        return features

    def _linear(self, inputs: int, outputs: int, *, std: float | None = None) -> nn.Linear:  # noqa: ARG002
        return super()._linear(inputs, outputs, std=0.02)

    def squash(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def merge(self, share: Tensor, known: Tensor, foreseen: Tensor) -> Tensor:
        return 2 * super().merge(share, known, foreseen)


def head_class(kind: str) -> tuple[type[ExitHead], int | None]:
    """Return the class of a kind of head, and the width that it names, if any; raises EectlError for an unknown kind."""
    stem, _, written = kind.rpartition("-")
    if f"{stem}-WIDTH" in HEADS and (kind not in HEADS or written == "WIDTH"):
        width = number_in(kind, f"{stem}-")
        if width is None:
            raise EectlError(
                f"exit head '{kind}': the width after {stem}- is a whole number from 1 to {MOST_IN_A_NAME:,}, such as {stem}-1024"
            )
        return HEADS[f"{stem}-WIDTH"], width
    return lookup(HEADS, kind, what="exit head"), None


def make_head(kind: str, feature: Feature, num_outputs: int) -> ExitHead:
    """Make a head of a kind that HEADS has, for features as wide as `feature`; raises EectlError for another kind.

    It has all its layers once it has joined its network's exits (`ExitHead.join`), which MultiExitModel makes it do.
    """
    found, width = head_class(kind)
    make: Callable[..., ExitHead] = found
    head = make(feature, num_outputs) if width is None else make(feature, num_outputs, width)
    head.kind = kind
    return head


HEADS: dict[str, type[ExitHead]] = in_order(
    HEAD_CHOICES,
    {
        "linear": LinearHead,
        "mlp-WIDTH": MlpHead,
        "sdn": SdnHead,
        "ztw": ZtwHead,
        "ztw-arithmetic": ArithmeticZtwHead,
        "gpf": GpfHead,
        "gpf-WIDTH": GpfHead,
        "gpf-lancopku": LancopkuGpfHead,
        "gpf-lancopku-WIDTH": LancopkuGpfHead,
    },
)
