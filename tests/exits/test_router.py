"""The router in all its ways: plain, waiting, refilling, a row alone. Every row gets what the offline choice gives it."""

import pytest
import torch
from exits.rigged import REAL_NETWORKS, build_network, decided, spread, thresholds_for
from torch.utils._python_dispatch import TorchDispatchMode
from toy_exits import WIDTH, CascadeHead, CountingBackbone, PlainHead, toy_model

from eectl.exits.criteria import CRITERIA, criterion_named
from eectl.exits.policy import ALWAYS, NEVER, Policy, Rule, choose
from eectl.exits.router import Router, rows_in_order
from eectl.exits.segment_times import SegmentTimes, learn_times
from eectl.models.backbone import Hidden
from eectl.models.heads import ExitOutput
from eectl.models.multi_exit import MultiExitModel

FREE, DEAR = (0.0,) * 99, (1e9,) * 99
PER_ROW = tuple(float(rows) for rows in range(99))  # a second a row


def times(*regroups):
    """Each row takes each segment a second; what regrouping costs after each attached exit."""
    return SegmentTimes((PER_ROW,) * (len(regroups) + 1), tuple(regroups))


def route(model, policy, inputs, mode, *, batch_size=None):
    """Logits and exits of all rows: `mode` is batches, waits, mixed (waits after odd exits) or refills."""
    size = batch_size or len(inputs)
    num_attached = model.num_exits - 1
    stages = {"waits": times(*[DEAR] * num_attached), "mixed": times(*([DEAR, FREE] * num_attached)[:num_attached])}
    router = Router(model, policy, times=stages.get(mode))
    if mode == "refills":
        answers = list(router.stream(inputs.split(size), batch_size=size))
        assert sorted(torch.cat([each.rows for each in answers]).tolist()) == list(range(len(inputs)))
        return rows_in_order(answers)
    parts = [router(part) for part in inputs.split(size)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([exits for _, exits in parts])


def check(model, inputs, policy, mode, *, batch_size=None, rtol=1e-3, atol=1e-4, few=0.8):
    """Against `choose` on all exits' logits; rows within 1e-5 of a threshold are left out. Returns the exits offline."""
    with torch.inference_mode():
        size = batch_size or len(inputs)
        parts = [[output.logits for output in model(part)] for part in inputs.split(size)]
        offline = torch.stack([torch.cat(each) for each in zip(*parts, strict=True)])
        scores = policy.criterion.scores(offline)
        chosen = choose(scores, policy.thresholds)
        logits, exits = route(model, policy, inputs, mode, batch_size=batch_size)
    distance = (scores[:-1] - torch.tensor(policy.thresholds)[:, None]).abs().amin(dim=0)
    clear = distance > (-1 if policy.criterion.name == "patience" else 1e-5)  # counts are exact
    assert clear.float().mean() >= few
    assert torch.equal(exits[clear], chosen[clear])
    torch.testing.assert_close(logits[clear], offline[chosen, torch.arange(len(inputs))][clear], rtol=rtol, atol=atol)
    return chosen


MODES = ["batches", "waits", "mixed", "refills"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", [PlainHead, CascadeHead])
@pytest.mark.parametrize("name", [*CRITERIA, "difference-2"])
def test_online_equals_offline(name, head, mode):
    model = toy_model(head, num_outputs=1 if name.startswith("difference") else 4, after=(0, 1, 2))
    inputs = torch.randn(97, WIDTH)
    with torch.inference_mode():
        scores = criterion_named(name).scores(torch.stack([output.logits for output in model(inputs)]))
    policy = Policy(criterion_named(name), thresholds_for(name, scores))
    for size in (97, 32, 7, 1):
        chosen = check(model, inputs, policy, mode, batch_size=size)
    assert len(set(chosen.tolist())) > 1


@pytest.mark.parametrize("name", REAL_NETWORKS)
@torch.inference_mode()
def test_every_kind_of_network(name):
    """Batches of other lengths refill each other; exits that hear earlier ones and ensembles hear those of the same rows."""
    model, batches = build_network(name)
    offline, policy, chosen = decided(model, batches)
    expected = offline[chosen, torch.arange(19)]
    assert len(set(chosen.tolist())) == model.num_exits
    for mode in ("batches", "waits", "mixed"):
        found = [route(model, policy, batch, mode) for batch in batches]
        assert torch.cat([exits for _, exits in found]).tolist() == chosen.tolist()
        torch.testing.assert_close(torch.cat([logits for logits, _ in found]), expected, rtol=1e-3, atol=1e-4)
    for size in (8, 3, 19):
        logits, exits = rows_in_order(list(Router(model, policy).stream(batches, batch_size=size)))
        assert exits.tolist() == chosen.tolist()
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    for row in range(0, 19, 3):
        logits, exits = Router(model, policy)(batches[row // 8][row % 8][None])
        assert exits.tolist() == [chosen[row]]
        torch.testing.assert_close(logits[0], expected[row], rtol=1e-3, atol=1e-4)


ENDS = {
    "nobody": (NEVER, NEVER),
    "all at exit 1": (ALWAYS, NEVER),
    "all at exit 2": (NEVER, ALWAYS),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("thresholds", ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("size", [1, 5, 13])
def test_batches_that_stay_whole(thresholds, mode, size):
    model = toy_model(CascadeHead)
    chosen = check(model, torch.randn(13, WIDTH), Policy(CRITERIA["margin"], thresholds), mode, batch_size=size)
    assert len(set(chosen.tolist())) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", [PlainHead, CascadeHead])
def test_one_survivor(head, mode):
    model = toy_model(head)
    inputs = torch.randn(9, WIDTH)
    with torch.inference_mode():
        least = CRITERIA["margin"].score(model(inputs)[0].logits, []).sort().values[:2].mean()
    chosen = check(model, inputs, Policy(CRITERIA["margin"], (float(least), NEVER)), mode, batch_size=4)
    assert sorted(chosen.tolist()) == [0] * 8 + [2]


def halves(model, inputs, share=0.5):
    """A policy under which about half of the rows that reach an exit leave there, and how many leave at each."""
    with torch.inference_mode():
        scores = CRITERIA["margin"].scores(torch.stack([output.logits for output in model(inputs)]))
    policy = Policy(CRITERIA["margin"], spread(scores, share))
    return policy, torch.bincount(choose(scores, policy.thresholds), minlength=len(scores)).tolist()


@torch.inference_mode()
def test_refilled_segments_see_full_batches():
    """Counted by hand: each segment after the first runs on whole batches of all that reach it, and once on the rest."""
    model = toy_model(after=(0, 1))
    inputs = torch.randn(61, WIDTH)
    policy, left = halves(model, inputs)
    model.backbone.runs.clear()
    route(model, policy, inputs, "refills", batch_size=8)
    runs = {block: [rows for each, rows in model.backbone.runs if each == block] for block in range(3)}
    reach = [61, 61 - left[0], left[2]]
    assert runs[0] == [8] * 7 + [5]
    for block in (1, 2):
        assert runs[block] == [8] * (reach[block] // 8) + [reach[block] % 8] * (reach[block] % 8 > 0)
    assert len(runs[2]) > 1


@torch.inference_mode()
def test_answers_come_while_batches_do():
    """When the router asks for the next batch, no queue holds a full one."""
    model = toy_model(after=(0, 1))
    inputs = torch.randn(64, WIDTH)
    policy, _ = halves(model, inputs)
    given, answered, behind = 0, 0, []

    def batches():
        nonlocal given
        for part in inputs.split(8):
            behind.append(given - answered)
            given += len(part)
            yield part

    for each in Router(model, policy).stream(batches(), batch_size=8):
        answered += len(each.rows)
    assert answered == 64
    assert max(behind) <= 2 * 7  # two queues, neither full


@pytest.mark.parametrize(("seconds", "queued"), [(0.0, False), (19.0, True), (21.0, False)])
@torch.inference_mode()
def test_rows_queue_only_where_company_pays(seconds, queued):
    """Later segments take 40 s however many rows there are: 4 of 8 rows gain 20 s from a full batch. Else (0) a second a row."""
    model = toy_model(after=(0, 1))
    inputs = torch.randn(64, WIDTH)
    policy = Policy(CRITERIA["margin"], (NEVER, NEVER))
    size, flat = 4, SegmentTimes((FREE, (40.0,) * 9, (40.0,) * 9), ((seconds,) * 9,) * 2)
    stages = flat if seconds else SegmentTimes((PER_ROW,) * 3, (FREE,) * 2)
    model.backbone.runs.clear()
    answers = list(Router(model, policy, times=stages).stream(inputs.split(size), batch_size=8))
    assert rows_in_order(answers)[1].tolist() == [2] * 64
    assert {rows for block, rows in model.backbone.runs if block} == ({8} if queued else {4})


@pytest.mark.parametrize("regroup", [0.0, 3.9, 4.0, 9.0, 14.0, 40.0])
@torch.inference_mode()
def test_waits_until_carrying_costs_more_than_regrouping(regroup):
    """The rule by hand: what was carried so far and would be next, against one regrouping. Segment k takes k/2 seconds a row."""
    model = toy_model(after=(0, 1))
    inputs = torch.randn(16, WIDTH)
    policy, left = halves(model, inputs, share=0.25)
    here, waiting, wasted, expected = 16, 16, 0.0, [16]
    for number in (1, 2):
        waiting -= left[number - 1]
        wasted += (here - waiting) * (number + 1) / 2
        if wasted > regroup:
            here, wasted = waiting, 0.0
        expected.append(here)
    model.backbone.runs.clear()
    segments = tuple(tuple(number * rows / 2 for rows in range(99)) for number in (1, 2, 3))
    Router(model, policy, times=SegmentTimes(segments, ((regroup,) * 99,) * 2))(inputs)
    assert [rows for _, rows in model.backbone.runs] == expected
    assert left[0] == 4 and all(left)


@torch.inference_mode()
def test_who_waited_longest_goes_first():
    model = toy_model()
    answers = Router(model, Policy(CRITERIA["margin"], (NEVER, NEVER))).stream(torch.randn(32, WIDTH).split(6), batch_size=4)
    assert torch.cat([each.rows for each in answers]).tolist() == list(range(32))


def test_a_threshold_is_a_float32_to_a_row_alone_too():
    """float32(0.7) is less than 0.7: a change of just that much is not below δ = 0.7 for `choose`, nor here."""
    now, before = torch.tensor([[0.7]]), [torch.tensor([[0.0]])]
    rule = Rule(Policy(CRITERIA["difference"], (-0.7, -0.7)))
    scores = CRITERIA["difference"].scores(torch.stack([*before, now, now]))
    assert choose(scores, (-0.7, -0.7)).tolist() == [2]
    assert rule.fires(2, now, before).tolist() == [rule.fires_alone(2, now, before)] == [False]


@torch.inference_mode()
def test_a_row_alone_is_not_indexed():
    model = toy_model(CascadeHead)
    policy = Policy(CRITERIA["max-softmax"], (NEVER, 0.1))
    router, row = Router(model, policy), torch.randn(1, WIDTH)
    router(row)
    seen = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
            seen.add(str(function).split(".")[1])
            return function(*arguments, **(named or {}))

    with Seen():
        _, exits = router(row)
    assert exits.tolist() == [1]
    assert "addmm" in seen or "linear" in seen
    assert not seen & {"index_select", "nonzero", "arange", "index", "sum", "count_nonzero", "cat", "gt"}


def test_mistakes_of_ours():
    model = toy_model()
    with pytest.raises(AssertionError):
        Router(model, Policy(CRITERIA["margin"], (0.5,)))
    with pytest.raises(AssertionError):
        Router(model, Policy(CRITERIA["margin"], (0.5, 0.5)))(torch.empty(0, WIDTH))
    model.exits[0].train()
    with pytest.raises(AssertionError):
        Router(model, Policy(CRITERIA["margin"], (0.5, 0.5)))


def test_hidden_rows_keep_their_layout():
    x = torch.randn(6, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    rows = torch.tensor([4, 0, 3])
    for hidden, expected in ((Hidden(x), x[rows]), (Hidden(x.contiguous()), x[rows]), (Hidden(x[:, :, 0]), x[rows][:, :, 0])):
        taken = hidden.take(rows).x
        assert torch.equal(taken, expected)
    layouts = [Hidden(each).take(rows).x.is_contiguous(memory_format=torch.channels_last) for each in (x, x.contiguous())]
    assert layouts == [True, False]
    assert Hidden.cat([Hidden(x), Hidden(x)]).x.is_contiguous(memory_format=torch.channels_last)


def test_gaps_are_closed_in_place():
    maps = torch.randn(6, 4, 3, 5)
    mask = torch.arange(6)[:, None] >= torch.arange(3)
    gaps, order = torch.tensor([0, 2]), torch.tensor([4, 1, 5, 3])
    for x in (maps.clone(), maps.clone(memory_format=torch.channels_last), (maps[:, 0].clone(), maps.clone())):
        hidden = Hidden(x, mask.clone())
        expected = hidden.take(order)
        closed = hidden.close_gaps(gaps, order)
        flat = [(each.x,) if isinstance(x, torch.Tensor) else each.x for each in (closed, expected, hidden)]
        for one, other, whole in zip(*flat, strict=True):
            assert torch.equal(one, other) and one.data_ptr() == whole.data_ptr()
            assert one.is_contiguous() == whole.is_contiguous()
        assert torch.equal(closed.mask, expected.mask) and torch.equal(hidden.mask, mask)


class Lazy(CountingBackbone):
    """Its first block does nothing, so that the inputs themselves are what flows on."""

    def block(self, index, hidden):
        return hidden if index == 0 else super().block(index, hidden)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_never_written_to(mode):
    torch.manual_seed(0)
    model = MultiExitModel(Lazy(4), [CascadeHead(4) for _ in range(2)], after=(0, 1)).eval()
    inputs = torch.randn(30, WIDTH)
    before = inputs.clone()
    policy, _ = halves(model, inputs, share=0.2)
    check(model, inputs, policy, mode, batch_size=15)
    assert torch.equal(inputs, before)
    with torch.inference_mode():
        learn_times(model, inputs, seconds=0)
    assert torch.equal(inputs, before)


class Shares(PlainHead):
    """Its state is the feature itself, in the memory of what flows on; each exit adds what the exit before has seen."""

    uses_earlier = True

    def forward(self, feature, earlier):
        x = feature.cls()
        return ExitOutput(self.fc(x) + (earlier[-1].state.mean(dim=1, keepdim=True) if earlier else 0), state=x)


@pytest.mark.parametrize("mode", MODES)
def test_states_that_share_the_memory_of_what_flows_on(mode):
    model = toy_model(Shares, after=(0, 1, 2))
    inputs = torch.randn(40, WIDTH)
    policy, left = halves(model, inputs, share=0.25)
    check(model, inputs, policy, mode, batch_size=20)
    assert all(left)


def test_hidden_split_and_cat():
    scales = (torch.randn(5, 2, 4, 4), torch.randn(5, 3, 2, 2))
    mask = torch.arange(5)[:, None] >= torch.arange(3)
    for hidden in (Hidden(scales[0]), Hidden(scales), Hidden(torch.randn(5, 3, 2), mask)):
        first, rest = hidden.split(2)
        again = Hidden.cat([first, rest])
        flat = [(each.x, each.mask) if isinstance(each.x, torch.Tensor) else each.x for each in (again, hidden)]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*flat, strict=True))


def test_hidden_cat_pads_texts():
    long, short = torch.randn(2, 4, 3), torch.randn(1, 2, 3)
    masks = torch.ones(2, 4, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    for order in (1, -1):
        parts = [Hidden(long, masks[0]), Hidden(short, masks[1])][::order]
        whole = Hidden.cat(parts)
        assert whole.x.shape == (3, 4, 3) and whole.mask.dtype == torch.bool
        row = 2 if order == 1 else 0
        assert torch.equal(whole.x[row, :2], short[0]) and not whole.x[row, 2:].any()
        assert whole.mask[row].tolist() == [True, True, False, False]
        assert torch.equal(whole.x[torch.arange(3) != row], long)
