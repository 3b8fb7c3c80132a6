"""The learners see what they may see and nothing else, and give a window the same states in any layout."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from models.learner import Learner
from models.narm import NARM

CAUSAL = ("sasrec", "narm", "gru4rec", "meanpool")  # a state has seen no later item
every_form = pytest.mark.parametrize(
    ("model", "head"), [(model, head) for model in tiny.LEARNERS for head in ("plain", "joint")]
)


def build(model, head="joint", **given):
    options = tiny.options(model=model, head=head, **given)
    return tiny.jitter(Learner(tiny.N_ITEMS, options)), options


def predict(learner, tasks):
    return learner.predict(tasks, tiny.rows(learner, tasks))


def reads(learner, tasks):
    """Whether the support prediction at a position (rows) depends on the rating at another (columns), T = 1."""
    jacobian = torch.autograd.functional.jacobian(
        lambda ratings: predict(learner, tasks._replace(ratings=ratings))[0].flatten(), tasks.ratings
    )
    return jacobian.flatten(1).abs() > 1e-12


@every_form
def test_same_predictions_in_any_layout(model, head):
    learner, _ = build(model, head)
    packed = tiny.lay_out([[5], [3, 2], [4, 1]], width=6, query_items=(3, 9))
    alone = tiny.lay_out([[5], [4], [3], [2], [1]], width=9, query_items=(3, 9))
    (support_p, query_p), (support_a, query_a) = predict(learner, packed), predict(learner, alone)
    torch.testing.assert_close(tiny.windows(support_p, packed), tiny.windows(support_a, alone))
    torch.testing.assert_close(query_p, query_a)


@every_form
def test_padding_changes_nothing(model, head):
    learner, _ = build(model, head)
    tasks = tiny.lay_out([[4], [2, 1]], width=7, query_items=(3,))
    real = tasks.segment > 0
    other = tasks._replace(
        items=torch.where(real, tasks.items, 5),
        ratings=torch.where(real, tasks.ratings, 7.0),
        position=torch.where(real, tasks.position, 2),
    )
    (support, query), (support_o, query_o) = predict(learner, tasks), predict(learner, other)
    torch.testing.assert_close(support[real], support_o[real])
    torch.testing.assert_close(query, query_o)


@every_form
def test_ratings_reach_later_predictions_of_their_window_through_errors_alone(model, head):
    """So a position's own rating never reaches its prediction, nor do those of other windows."""
    learner, options = build(model, head)
    tasks = tiny.lay_out([[5], [2, 3]], width=6, query_items=(3,))
    segment, row = tasks.segment.flatten(), torch.arange(12) // 6
    same = (segment == segment[:, None]) & (row == row[:, None]) & (segment > 0)
    assert torch.equal(reads(learner, tasks), same.tril(-1) & (head == "joint"))
    for task in tiny.single(tiny.training_tasks(options)):
        assert not reads(learner, task).diagonal().any()


@every_form
def test_predictions_are_blind_to_query_ratings_and_other_queries(model, head):
    learner, _ = build(model, head)
    tasks = tiny.lay_out([[4], [2, 1]], query_items=(1, 7, 7, 3))
    support, query = predict(learner, tasks)
    _, other = predict(learner, tasks._replace(query_ratings=tasks.query_ratings + 1))
    torch.testing.assert_close(query, other, rtol=0, atol=0)
    for place in range(4):
        support_s, query_s = predict(learner, tasks._replace(query_items=tasks.query_items[:, place : place + 1]))
        torch.testing.assert_close(query_s[:, 0], query[:, place])
        torch.testing.assert_close(support_s, support)


@every_form
def test_queries_of_all_tasks_alike_and_in_parts_are_predicted_the_same(model, head):
    learner, options = build(model, head)
    tasks, everything = tiny.training_tasks(options), torch.arange(1, 1 + tiny.N_ITEMS)[None]
    numbers = tasks.table.gather(1, tasks.items.flatten(1)).view_as(tasks.items)
    tasks = tasks._replace(items=numbers, query_items=everything.expand(len(tasks.table), -1))
    expected = learner.predict(tasks, learner.tables())
    for items, at_once in ((everything, None), (everything, 7), (tasks.query_items, 7)):
        found = learner.predict(tasks._replace(query_items=items), learner.tables(), at_once=at_once)
        torch.testing.assert_close(found, expected)


@every_form
def test_which_items_a_position_reads(model, head):
    learner, _ = build(model, head)
    if head == "joint":  # every position reads the audiences of all items
        learner.item_audience.data.zero_()
    tasks = tiny.lay_out([[6]], query_items=(3,))
    first, query = predict(learner, tasks)
    for t in range(6):
        items = tasks.items.clone()
        items[0, 0, t] = items[0, 0, t] % 9 + 1
        changed = predict(learner, tasks._replace(items=items))
        difference = (changed[0] - first).abs()[0, 0]
        assert difference[t] > 1e-9
        assert t == 0 or (model in CAUSAL) == (not difference[:t].any())
        assert (changed[1] - query).abs().max() > 1e-9


@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_mean_pooling_alone_reads_no_order(model):
    encoder, tasks = build(model)[0].encoder, tiny.lay_out([[6]])
    history, query = tiny.random(1, 1, 6, 8), tiny.random(1, 3, 8, seed=1)
    orders = history, history[:, :, [4, 1, 0, 2, 3, 5]]
    found, other = (encoder.encode_query(query, encoder.encode_history(items, tasks)[1]) for items in orders)
    assert torch.allclose(found, other) == (model == "meanpool")


def test_mean_pooling_equals_a_loop_over_positions():
    encoder, tasks, history = build("meanpool")[0].encoder, tiny.lay_out([[4]]), tiny.random(1, 1, 4, 8)
    states, _ = encoder.encode_history(history, tasks)
    for t, item in enumerate(history[0, 0]):
        past = history[0, 0, :t].sum(0) / max(t, 1)
        x = encoder.own.weight @ item + encoder.own.bias + encoder.past.weight @ past
        for linear in encoder.mlp[1:-1:2]:
            x = linear.weight @ F.gelu(x) + linear.bias
        torch.testing.assert_close(states[0, 0, t], F.layer_norm(x, (8,), encoder.mlp[-1].weight, encoder.mlp[-1].bias))


def test_narm_equals_its_equations():
    """Equations 6 to 9 of the paper, in a loop over positions."""
    narm = tiny.jitter(NARM(8, heads=1, layers=2, length=7))
    tasks, inputs, query = tiny.lay_out([[6]], width=7), tiny.random(1, 1, 7, 8), tiny.random(1, 2, 8, seed=1)

    def run(layers, sequence):
        for layer in layers:
            state, states = torch.zeros(1, 1, 8, dtype=torch.float64), []
            for x in sequence:
                state = layer.step(x.view(1, 1, -1), state)
                states.append(state)
            sequence = states
        return [state.flatten() for state in sequence]

    def last(sequence):
        state, past = run(narm.globals, sequence)[-1], run(narm.locals, sequence)
        target = narm.at_target(past[-1])
        local = sum(narm.similarity(torch.sigmoid(target + narm.at_past(one))) * one for one in past)
        return narm.norm(narm.decode(torch.cat([state, local])))

    states, memory = narm.encode_history(inputs, tasks)
    after = narm.encode_query(query, memory)
    for t in range(6):
        torch.testing.assert_close(states[0, 0, t], last(inputs[0, 0, : t + 1]))
    for one, got in zip(query[0], after[0], strict=True):
        torch.testing.assert_close(got, last([*inputs[0, 0, :6], one]))


def test_joint_head_is_the_sum_of_its_terms():
    learner, _ = build("sasrec")
    head, state, items = learner.head, tiny.random(4, 8), torch.tensor([1, 5, 5, 9])
    rows = {name: table[items] for name, table in learner.tables().items()}
    shift = tiny.random(4, 4, seed=1)
    of_each = zip(head(state, rows, shift), state, rows["item_effect"][:, 0], rows["item_factor"], shift, strict=True)
    for prediction, h, effect, factor, own in of_each:
        vector = head.user_vector + head.to_vector.weight @ h + own[1:]
        expected = effect + head.user_bias + own[0] + factor @ vector
        torch.testing.assert_close(prediction, expected + head.state_weight @ h)


def test_choices_are_the_faded_sum_of_the_audiences_of_the_whole_support():
    learner, _ = build("sasrec")
    head, tables = learner.head, learner.tables()
    tasks = tiny.lay_out([[5, 2], [3]], query_items=(3,))  # two windows in the row of the whole support
    alike = head.log_alike.exp().item()
    for support in (5, 0):
        changed = tasks._replace(n_support=torch.tensor([support]), segment=tasks.segment * (support > 0))
        found = head.choices(changed, {"item_audience": tables["item_audience"][tasks.items]})
        total = tables["item_audience"][tasks.items[0, 0, :support]].sum(0)
        torch.testing.assert_close(found[0], head.choice * total * alike / (alike + support))


def test_plain_head_is_linear_in_the_state():
    head, state = build("sasrec", "plain")[0].head, tiny.random(4, 8)
    torch.testing.assert_close(head(state, {}), state @ head.weight + head.bias)


@pytest.mark.parametrize("windows", [1, 5])  # one row a task, or several
@every_form
def test_predictions_are_inner_products_with_what_the_head_adapts(model, head, windows):
    learner, options = build(model, head, num_samples=windows)
    tasks = tiny.training_tasks(options)
    assert (tasks.items.shape[1] > 1) == (windows > 1)
    assert not tasks.query.all() and (tasks.segment == 0).any()
    adapted = [learner.get_parameter(name).flatten() for name in learner.head.adapted]
    one = torch.cat([torch.ones(1, dtype=torch.float64), *adapted])
    rows, outs = tiny.rows(learner, tasks), []
    for support, query in ((f @ one for f in learner.features(tasks, rows)), learner.predict(tasks, rows)):
        out = torch.cat([support[tasks.segment > 0], query[tasks.query]])
        slopes = torch.autograd.grad(
            out.square().sum(), list(learner.parameters()), retain_graph=True, materialize_grads=True
        )
        outs.append((out, slopes))
    torch.testing.assert_close(*outs)


def test_initial_weights_hang_on_their_seed_alone():
    first = Learner(9, tiny.options()).state_dict()
    torch.manual_seed(1)
    again, other = (Learner(9, tiny.options(model_init_seed=seed)).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["item_embedding"], other["item_embedding"])
    assert not first["item_embedding"][0].any()
