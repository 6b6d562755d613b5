"""Early exit in programs of fixed shape, called plainly and replayed from a tape. Every row gets what `choose` gives it."""

import random
from collections import Counter

import pytest
import torch
from exits.rigged import REAL_NETWORKS, build_network, decided, spread, thresholds_for
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import Tape
from toy_exits import WIDTH, CascadeHead, CountingBackbone, PlainHead, toy_model

from eectl.core.capture import Capture, recorder_for
from eectl.exits import stages, static_router
from eectl.exits.criteria import CRITERIA, criterion_named
from eectl.exits.full_pass import FullPass, PlainPass
from eectl.exits.policy import ALWAYS, NEVER, Policy, choose
from eectl.exits.router import rows_in_order
from eectl.exits.stages import in_bucket
from eectl.exits.static_router import Direct, StaticRouter
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel


def refuse(line):
    raise AssertionError(line)


def taped(**options):
    """A capture on a tape; a program that cannot be recorded, as one that reads a value back cannot, fails the test."""
    return Capture(Tape(), say=refuse, **{"plain_calls": 1, **options})


class Late:
    """Counts that arrive only when they are waited for, or after being asked for a number of times that varies."""

    lags = True

    def __init__(self, seed=0):
        self.draw = random.Random(seed)
        self.under_way = []

    def send(self, counts):
        self.under_way = [each for each in self.under_way if not each.is_read]
        self.under_way.append(LateCounts(counts.tolist(), self.draw.choice([0, 1, 2, 5, 10**9]), before=self.under_way[-1:]))
        return self.under_way[-1]


class LateCounts:
    def __init__(self, counts, asks, *, before):
        self.counts, self.asks, self.before, self.is_read = counts, asks, before, False

    def arrived(self):
        self.asks -= 1
        return self.asks < 0 and all(each.is_read for each in self.before)

    def read(self):
        self.is_read = True
        return self.counts


WAYS = {"plain": dict, "taped": lambda: {"capture": taped()}, "late": lambda: {"courier": Late()}}


@pytest.fixture(params=WAYS)
def options(request):
    return WAYS[request.param]()


@torch.inference_mode()
def offline(model, inputs, criterion):
    """Logits [exit, row, class] and scores [exit, row]."""
    logits = torch.stack([output.logits for output in model(inputs)])
    return logits, criterion.scores(logits)


def check_answers(found, logits, chosen, *, clear=None, rtol=1e-4, atol=1e-5):
    """All rows that are not as close to a threshold as rounding is."""
    clear = slice(None) if clear is None else clear
    assert found[1][clear].tolist() == chosen[clear].tolist()
    expected = logits[chosen, torch.arange(len(chosen))]
    torch.testing.assert_close(found[0][clear], expected[clear], rtol=rtol, atol=atol)


def route(router, inputs, size, *, streams):
    if streams:
        answers = list(router.stream(inputs.split(size), batch_size=size))
        assert sorted(torch.cat([each.rows for each in answers]).tolist()) == list(range(len(inputs)))
        return rows_in_order(answers)
    parts = [router(part) for part in inputs.split(size)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([exits for _, exits in parts])


@pytest.mark.parametrize("streams", [False, True], ids=["batch", "stream"])
@pytest.mark.parametrize("head", [PlainHead, CascadeHead])
@pytest.mark.parametrize("name", [*CRITERIA, "difference-2"])
@torch.inference_mode()
def test_every_criterion_at_every_size(name, head, streams, options):
    model = toy_model(head, num_outputs=1 if name.startswith("difference") else 4, after=(0, 1, 2))
    inputs = torch.randn(600, WIDTH)
    criterion = criterion_named(name)
    logits, scores = offline(model, inputs, criterion)
    policy = Policy(criterion, thresholds_for(name, scores))
    chosen = choose(scores, policy.thresholds)
    assert len(set(chosen.tolist())) > 1
    router = StaticRouter(model, policy, **options)
    distance = (scores[:-1] - torch.tensor(policy.thresholds)[:, None]).abs().amin(dim=0)
    clear = distance > (-1 if name == "patience" else 1e-5)
    assert clear.float().mean() > 0.99
    for size, rows in ((1, 20), (2, 30), (3, 40), (7, 80), (32, 200), (100, 600), (512, 600)):
        found = route(router, inputs[:rows], size, streams=streams)
        check_answers(found, logits[:, :rows], chosen[:rows], clear=clear[:rows])


@pytest.mark.parametrize("way", ["plain", "taped"])
@pytest.mark.parametrize("name", REAL_NETWORKS)
@torch.inference_mode()
def test_every_kind_of_network(name, way, monkeypatch):
    """Batches of texts of several lengths too: padding up to a bucket changes no answer, nor does another bucket in a stream."""
    model, batches = build_network(name)
    logits, policy, chosen = decided(model, batches)
    assert len(set(chosen.tolist())) == model.num_exits
    router = StaticRouter(model, policy, **WAYS[way]())
    close = {"rtol": 1e-3, "atol": 1e-4}
    for _ in range(3 if way == "taped" else 1):
        parts = [router(batch) for batch in batches]
        check_answers((torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])), logits, chosen, **close)
        for size in (8, 3, 19):
            check_answers(rows_in_order(list(router.stream(batches, batch_size=size))), logits, chosen, **close)
    if len({batch.shape[-1] for batch in batches}) > 1:
        monkeypatch.setattr(stages, "TOKENS", 4)  # so that the lengths fall into two buckets
        check_answers(rows_in_order(list(router.stream(batches, batch_size=3))), logits, chosen, **close)
    for row in range(0, 19, 6):
        found = router(batches[row // 8][row % 8][None])
        check_answers(found, logits[:, row : row + 1], chosen[row : row + 1], **close)


ENDS = {"nobody leaves": (NEVER, NEVER), "all leave at exit 1": (ALWAYS, NEVER), "all leave at exit 2": (NEVER, ALWAYS)}


@pytest.mark.parametrize("streams", [False, True], ids=["batch", "stream"])
@pytest.mark.parametrize("number", range(3), ids=list(ENDS))
@torch.inference_mode()
def test_batches_that_stay_whole(number, streams, options):
    model, inputs = toy_model(CascadeHead), torch.randn(50, WIDTH)
    logits, scores = offline(model, inputs, CRITERIA["margin"])
    policy = Policy(CRITERIA["margin"], list(ENDS.values())[number])
    router = StaticRouter(model, policy, **options)
    for size in (1, 6, 50):
        found = route(router, inputs, size, streams=streams)
        assert set(found[1].tolist()) == {2 if number == 0 else number - 1}
        check_answers(found, logits, choose(scores, policy.thresholds))


@pytest.mark.parametrize("streams", [False, True], ids=["batch", "stream"])
@torch.inference_mode()
def test_a_score_that_is_no_number_never_fires(streams, options):
    model, inputs = toy_model(), torch.randn(40, WIDTH)
    inputs[::3] = torch.nan
    router = StaticRouter(model, Policy(CRITERIA["margin"], (ALWAYS, ALWAYS)), **options)
    logits, exits = route(router, inputs, 8, streams=streams)
    assert exits.tolist() == [2 if row % 3 == 0 else 0 for row in range(40)]
    assert logits.isnan().any(dim=1).tolist() == [row % 3 == 0 for row in range(40)]


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.integers(1, 23), min_size=1, max_size=12),
    size=st.integers(1, 11),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    seed=st.integers(0, 99),
    late=st.booleans(),
)
@torch.inference_mode()
def test_streams_of_uneven_batches(parts, size, shares, seed, late):
    """No ring overflows whatever comes when, and answers are numbered as rows came."""
    model = toy_model(CascadeHead, after=(0, 1, 2))
    inputs = torch.randn(sum(parts), WIDTH, generator=torch.Generator().manual_seed(seed))
    logits, scores = offline(model, inputs, CRITERIA["margin"])
    thresholds = tuple(float(row.quantile(share)) + 1e-5 for row, share in zip(scores, shares, strict=False))
    router = StaticRouter(model, Policy(CRITERIA["margin"], thresholds), courier=Late(seed) if late else None)
    answers = list(router.stream(inputs.split(parts), batch_size=size))
    assert sorted(torch.cat([each.rows for each in answers]).tolist()) == list(range(len(inputs)))
    distance = (scores[:-1] - torch.tensor(thresholds)[:, None]).abs().amin(dim=0)
    check_answers(rows_in_order(answers), logits, choose(scores, thresholds), clear=distance > 1e-6)


@torch.inference_mode()
def test_a_replayed_pass_runs_no_python_and_launches_whole_programs():
    """Recorded once for each exit and size; from then on one replay for each exit, and nothing of the network in Python."""
    model, inputs = toy_model(CascadeHead), torch.randn(16, WIDTH)
    router = StaticRouter(model, Policy(CRITERIA["margin"], (NEVER, NEVER)), capture=(capture := taped()))
    for _ in range(2):
        router(inputs)
    recorded = len(capture.recorder.num_operations)
    assert recorded == 3
    model.backbone.runs.clear()
    before = capture.recorder.replays
    for _ in range(5):
        router(inputs)
    assert capture.recorder.replays - before == 5 * 3 and len(capture.recorder.num_operations) == recorded
    assert model.backbone.runs == []


@torch.inference_mode()
def test_sizes_shrink_by_powers_of_two_one_exit_late():
    """By hand: of 32 rows 23 leave at exit 1, so 9 are left: the next segment takes 16; where counts lag, the one after it."""
    model, inputs = toy_model(after=(0, 1)), torch.randn(32, WIDTH)
    _, scores = offline(model, inputs, CRITERIA["margin"])
    ranked = scores[0].sort(descending=True).values
    policy = Policy(CRITERIA["margin"], (float(ranked[22:24].mean()), NEVER))
    for courier, expected in ((Direct(), [32, 16, 16]), (Late(), [32, 32, 16])):
        model.backbone.runs.clear()
        StaticRouter(model, policy, courier=courier)(inputs)
        assert [rows for _, rows in model.backbone.runs[3:]] == expected  # the first three look for shapes


@torch.inference_mode()
def test_nothing_runs_once_all_have_left():
    model, inputs = toy_model(after=(0, 1, 2)), torch.randn(8, WIDTH)
    for courier, blocks in ((Direct(), 1), (Late(), 2)):
        router = StaticRouter(model, Policy(CRITERIA["margin"], (ALWAYS, ALWAYS, ALWAYS)), courier=courier)
        router(inputs)
        model.backbone.runs.clear()
        router(inputs)
        assert len(model.backbone.runs) == blocks


@torch.inference_mode()
def test_a_stream_runs_full_batches_but_for_its_end():
    """Counted by hand: each segment sees all that reach it in batches of eight, and pads one at most."""
    model, inputs = toy_model(after=(0, 1)), torch.randn(61, WIDTH)
    _, scores = offline(model, inputs, CRITERIA["margin"])
    policy = Policy(CRITERIA["margin"], spread(scores, 0.5))
    left = torch.bincount(choose(scores, policy.thresholds), minlength=3).tolist()
    router = StaticRouter(model, policy)
    list(router.stream(inputs.split(8), batch_size=8))
    model.backbone.runs.clear()
    list(router.stream(inputs.split(8), batch_size=8))
    runs = Counter(block for block, rows in model.backbone.runs if rows == 8)
    assert len(model.backbone.runs) == sum(runs.values())
    assert [runs[block] for block in range(3)] == [-(-reach // 8) for reach in (61, 61 - left[0], left[2])]


@torch.inference_mode()
def test_who_waited_longest_goes_first_and_answers_come_while_batches_do(options):
    model, behind, given, answered = toy_model(), [], 0, 0
    inputs = torch.randn(64, WIDTH)

    def batches():
        nonlocal given
        for part in inputs.split(6):
            behind.append(given - answered)
            given += len(part)
            yield part

    order = []
    for each in StaticRouter(model, Policy(CRITERIA["margin"], (NEVER, NEVER)), **options).stream(batches(), batch_size=4):
        answered += len(each.rows)
        order += each.rows.tolist()
    assert order == list(range(64))
    assert max(behind) <= 4 * (3 + static_router.IN_FLIGHT) * 2


@torch.inference_mode()
def test_programs_of_few_shapes_are_kept_and_larger_batches_replace_smaller_ones():
    model = toy_model()
    capture = taped()
    router = StaticRouter(model, Policy(CRITERIA["margin"], (NEVER, NEVER)), capture=capture)
    for size in (4, 4, 3, 4):
        router(torch.randn(size, WIDTH))
    assert len(capture.recorder.num_operations) == 3  # three rows go where four do
    for size in (9, 9, 4, 4):
        router(torch.randn(size, WIDTH))
    assert len(router._kept) == 1 and len(capture.recorder.num_operations) == 3 + 3 + 3
    for size in range(1, 8):
        list(router.stream([torch.randn(8, WIDTH)], batch_size=size))
    assert len(router._kept) == static_router.MOST_SHAPES


class Lazy(CountingBackbone):
    """Its first block does nothing, so that the inputs themselves are what flows on."""

    def block(self, index, hidden):
        return hidden if index == 0 else super().block(index, hidden)


class Shares(PlainHead):
    """Its state is the feature itself, in the memory of what flows on; each exit adds what the exit before has seen."""

    uses_earlier = True

    def forward(self, feature, earlier):
        x = feature.cls()
        return ExitOutput(self.fc(x) + (earlier[-1].state.mean(dim=1, keepdim=True) if earlier else 0), state=x)


@pytest.mark.parametrize("streams", [False, True], ids=["batch", "stream"])
@torch.inference_mode()
def test_memory_that_is_shared(streams, options):
    torch.manual_seed(0)
    model = MultiExitModel(Lazy(4), [Shares(4) for _ in range(2)], after=(0, 1)).eval()
    inputs = torch.randn(40, WIDTH)
    before = inputs.clone()
    logits, scores = offline(model, inputs, CRITERIA["margin"])
    policy = Policy(CRITERIA["margin"], spread(scores, 0.25))
    router = StaticRouter(model, policy, **options)
    results = [route(router, inputs, 20, streams=streams) for _ in range(3)]
    assert torch.equal(inputs, before)
    for found in results:  # a later call changes no earlier answer
        check_answers(found, logits, choose(scores, policy.thresholds))


@torch.inference_mode()
def test_autocast_is_recorded_with_the_rest():
    """The rings hold bfloat16 then, and the answers the widest type of all exits."""
    model, inputs = toy_model(CascadeHead), torch.randn(20, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, scores = offline(model, inputs, CRITERIA["margin"])
        policy = Policy(CRITERIA["margin"], spread(scores, 0.4))
        for options in ({}, {"capture": taped()}):
            router = StaticRouter(model, policy, **options)
            for streams in (False, False, True, True):
                found = route(router, inputs, 20, streams=streams)
                assert found[0].dtype == torch.bfloat16
                check_answers(found, logits, choose(scores, policy.thresholds), rtol=2e-2, atol=2e-2)


def test_texts_are_padded_to_buckets():
    for tokens, longest, expected in ((5, None, 32), (32, None, 32), (33, None, 64), (33, 40, 40), (41, 40, 41)):
        rows = torch.randint(1, 9, (2, 3, tokens))
        padded = in_bucket(rows, longest=longest)
        assert padded.shape == (2, 3, expected)
        assert torch.equal(padded[:, :, :tokens], rows) and not padded[:, :, tokens:].any()
    images = torch.randn(2, 3, 5)
    assert in_bucket(images) is images


@torch.inference_mode()
def test_rings_that_would_take_much_memory_hold_fewer_batches(monkeypatch):
    """By hand: a row is 24 bytes in each of two rings, a batch of eight 384; so 1,600 bytes hold four of them."""
    model, inputs = toy_model(CascadeHead), torch.randn(200, WIDTH)
    logits, scores = offline(model, inputs, CRITERIA["margin"])
    policy = Policy(CRITERIA["margin"], spread(scores, 0.3))
    for most, in_flight in ((1, 1), (1600, 2), (1 << 20, static_router.IN_FLIGHT)):
        monkeypatch.setattr(stages, "MOST_BYTES", most)
        router = StaticRouter(model, policy, courier=Late(7))
        check_answers(route(router, inputs, 8, streams=True), logits, choose(scores, policy.thresholds))
        assert [(each.in_flight, each.capacity) for each in router._kept.values()] == [(in_flight, 8 * (2 + in_flight))]


@pytest.mark.parametrize("way", ["plain", "taped"])
@pytest.mark.parametrize("name", REAL_NETWORKS)
@torch.inference_mode()
def test_the_full_pass_gives_the_same_answers(name, way):
    model, batches = build_network(name)
    parts = [[output.logits for output in model(part)] for part in batches]
    logits = torch.stack([torch.cat(each) for each in zip(*parts, strict=True)])
    scores = CRITERIA["margin"].scores(logits)
    policy = Policy(CRITERIA["margin"], spread(scores, 0.3))
    options = {"capture": taped()} if way == "taped" else {}
    full, plain = FullPass(model, policy, **options), PlainPass(model.backbone, **options)
    close = {"rtol": 1e-3, "atol": 1e-4}
    for _ in range(3):
        answers = rows_in_order(list(full.stream(batches, batch_size=3)))
        check_answers(answers, logits, choose(scores, policy.thresholds), **close)
        torch.testing.assert_close(torch.cat([plain(batch) for batch in batches]), logits[-1], **close)


@pytest.mark.parametrize("name", [*CRITERIA, "difference-2"])
@torch.inference_mode()
def test_the_full_pass_decides_as_choose_does(name):
    model = toy_model(num_outputs=1 if name.startswith("difference") else 4, after=(0, 1, 2))
    inputs, criterion = torch.randn(60, WIDTH), criterion_named(name)
    inputs[5] = torch.nan
    logits, scores = offline(model, inputs, criterion)
    finite = torch.arange(60) != 5
    policy = Policy(criterion, thresholds_for(name, scores[:, finite]))
    found = FullPass(model, policy)(inputs)
    assert torch.equal(found[1], choose(scores, policy.thresholds))
    assert found[1][5] == 3 or name == "patience"  # which compares predictions, and those are there
    check_answers(found, logits, choose(scores, policy.thresholds), clear=finite)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["resnet", "ztw", "gpf", "msdnet", "bert", "mlp"])
@torch.inference_mode()
def test_on_a_gpu(name):
    """In CUDA graphs, none of which fails to be recorded, and with counts that arrive on their own."""
    model, batches = build_network(name)
    model, batches = model.to("cuda"), [batch.to("cuda") for batch in batches]
    logits = torch.stack([torch.cat(each) for each in zip(*[[o.logits for o in model(part)] for part in batches], strict=True)])
    scores = CRITERIA["margin"].scores(logits).cpu()
    policy = Policy(CRITERIA["margin"], spread(scores, 0.3))
    chosen = choose(scores, policy.thresholds)
    capture = Capture(recorder_for(torch.device("cuda")), plain_calls=1, say=refuse)
    routers = StaticRouter(model, policy, capture=capture), FullPass(model, policy, capture=capture)
    close = {"rtol": 1e-2, "atol": 1e-2}
    for _ in range(3):
        for router in routers:
            parts = [router(batch) for batch in batches]
            found = torch.cat([one for one, _ in parts]).cpu(), torch.cat([one for _, one in parts]).cpu()
            check_answers(found, logits.cpu(), chosen, **close)
            for size in (8, 3):
                found = rows_in_order(list(router.stream(batches, batch_size=size)))
                check_answers((found[0].cpu(), found[1].cpu()), logits.cpu(), chosen, **close)
    capture.close()
