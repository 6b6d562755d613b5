"""Exit heads: what turns a block's Feature into logits. Widths come from an example Feature; no head knows a layout."""

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
from eectl.recipe.choices import HEAD_CHOICES, in_order


@dataclass(frozen=True)
class ExitOutput:
    """An exit's logits [row, class], and what later exits and losses may read.

    `state` [row, …] is what later exits read; `guesses` [row, later exit, …] are the states that this exit foresees.
    """

    logits: Tensor
    state: Tensor | None = None
    guesses: Tensor | None = None


class ExitHead(nn.Module, ABC):
    """An exit's classifier: what it `reads` of a feature, which no parameter touches, and what it `says` of that.

    `uses_earlier` says that it reads the outputs of the exits before it; `kind` is its recipe name.

    `default_weights` is how the losses of such exits are weighted where the recipe says `auto`, `auxiliary` names their entry in
    `losses.AUXILIARY` and `ensemble` theirs in `ensembles.ENSEMBLES`, if any.
    """

    uses_earlier: ClassVar[bool] = False
    default_weights: ClassVar[str] = "uniform"
    auxiliary: ClassVar[str | None] = None
    ensemble: ClassVar[str | None] = None
    kind: str = ""

    @abstractmethod
    def reads(self, feature: Feature) -> Tensor:
        """All that the head takes from a block's feature, [row, …]: small, and the same as long as the backbone is."""

    @abstractmethod
    def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        """Logits [row, class] from what it `reads` and the outputs of the exits before this one."""

    def forward(self, feature: Feature, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        """Logits [row, class] from a block's feature and the outputs of the exits before this one."""
        return self.says(self.reads(feature), earlier)

    def join(self, peers: "Sequence[ExitHead]", number: int) -> None:
        """Take a place among a network's attached exits `peers`, as exit `number` (from 1); may make the layers that this needs.

        A reference to the peers must not register them as submodules (a tuple does not): their network owns them. Joining the
        same place again changes no weight. Raises EectlError where such exits do not go together.
        """


class LinearHead(ExitHead):
    """Class token (or the mean, where there is none) → Linear, without a norm before it: the paper's standard ViT head."""

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
    """a · max + (1 − a) · mean over a 4×4 grid of the map → Linear; a is learnt, starts in U(0, 1) and is not clamped.

    Shallow-Deep Networks (Kaya et al., 2019), with adaptive pooling: a map below 4×4 has its cells repeated.
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

    The features are SDN's pooling of a convolutional map, the class token (or the mean) otherwise. The logits that it hears are
    the earlier head's own, detached; the first exit hears none. `state` is this head's own logits, whatever an ensemble makes
    of them later.
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
    """The same cascade, its ensembles being weighted means of probabilities instead of log-probabilities."""

    ensemble = "arithmetic"


class GpfHead(ExitHead):
    """Global Past-Future (Liao et al., 2021) as kamadforge/early-exit-benchmark has it: what all exits know, or will know.

    Exit k's state is s_k = φ(Linear(class token, or the mean: on a convolutional map too)), `width` wide. Imitator j guesses the
    state of exit j from that of any exit before it, ŝ_j = φ(Linear_j(s_k)). With λ = sigmoid(Linear(φ(mean of G_j s_j, j ≤ k))),

        logits = λ · Σ_{j ≤ k} A_j s_j + (1 − λ) · Σ_{j > k} A_j ŝ_j

    where φ is ReLU and the states of earlier exits are detached. Head j owns A_j, G_j and imitator j; head 1, which nothing
    foresees, owns λ's Linear, which all share. So an exit's logits also move with the later heads. No dropout on states.
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
        """The width of states where the kind names none."""
        return 512

    def _linear(self, inputs: int, outputs: int, *, std: float | None = None) -> nn.Linear:
        """A layer with weights in N(0, std) and biases 0; none: as PyTorch draws them."""
        layer = nn.Linear(inputs, outputs)
        if std is not None:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        return layer

    def squash(self, x: Tensor) -> Tensor:
        """φ."""
        return functional.relu(x)

    def merge(self, share: Tensor, known: Tensor, foreseen: Tensor) -> Tensor:
        """Logits from λ and the two sums, all [row, class]."""
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
        """This exit's state [row, width] as an earlier exit's `state` lets it be foreseen."""
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
    """GPF as its authors' lancopku/Early-Exit has it: φ is tanh, and the merge is 2λ · known + (2 − 2λ) · foreseen.

    States are as wide as the features where the kind names no width, weights start in N(0, 0.02) with biases 0 (BERT's), and the
    loss is half of exits and imitation together. Its dropout on states and its random cuts below lower layers are left out.
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
    """The class of head `kind` and the width that it names, if any; raises EectlError for a kind that is not there."""
    stem, _, width = kind.rpartition("-")
    if f"{stem}-WIDTH" in HEADS and (kind not in HEADS or width == "WIDTH"):
        if not (width.isascii() and width.isdecimal() and int(width) > 0):
            raise EectlError(f"exit head '{kind}': the width after {stem}- is a whole number from 1, such as {stem}-1024")
        return HEADS[f"{stem}-WIDTH"], int(width)
    return lookup(HEADS, kind, what="exit head"), None


def make_head(kind: str, feature: Feature, num_outputs: int) -> ExitHead:
    """A head of `kind` (see HEADS) for features like `feature`; raises EectlError for another kind.

    It is whole once it has joined its network's exits (`ExitHead.join`), which MultiExitModel sees to.
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
