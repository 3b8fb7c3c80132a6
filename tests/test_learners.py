"""The learners see what they may see and nothing else, and give a window the same states in any layout."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from models.layers import continues
from models.learner import Learner
from models.narm import NARM

FORMS = [(model, reads, head) for model in tiny.LEARNERS for reads, head in ((False, "plain"), (True, "joint"))]
every_form = pytest.mark.parametrize(("model", "reads", "head"), FORMS)


def build(model, reads=False, head="plain", n_items=9, **given):
    options = tiny.options(model=model, use_rating_input=reads, head=head, **given)
    return tiny.jitter(Learner(n_items, options)), options


def tables(learner, tasks):
    return {name: F.embedding(tasks.table, learner.get_parameter(name)) for name in learner.table_names()}


def predict(learner, tasks):
    return learner.predict(tasks, tables(learner, tasks))


def slices(tasks):
    """The tasks of a batch one by one."""
    return [type(tasks)(*parts) for parts in zip(*tasks, strict=True)]


@every_form
def test_same_predictions_in_any_layout(model, reads, head):
    learner, _ = build(model, reads, head)
    packed = tiny.lay_out([[5], [3, 2], [4, 1]], width=6, query_items=(3, 9))
    alone = tiny.lay_out([[5], [4], [3], [2], [1]], width=9, query_items=(3, 9))
    (history_p, query_p), (history_a, query_a) = predict(learner, packed), predict(learner, alone)
    torch.testing.assert_close(tiny.windows(history_p, packed), tiny.windows(history_a, alone))
    torch.testing.assert_close(query_p, query_a)


@every_form
def test_padding_items_change_nothing(model, reads, head):
    learner, _ = build(model, reads, head)
    tasks = tiny.lay_out([[4], [2, 1]], width=7, query_items=(3,))
    real = tasks.segment > 0
    other = tasks._replace(
        items=torch.where(real, tasks.items, 5),
        ratings=torch.where(real, tasks.ratings, 7.0),
        position=torch.where(real, tasks.position, 2),
    )
    (history, query), (history_o, query_o) = predict(learner, tasks), predict(learner, other)
    torch.testing.assert_close(history[real], history_o[real])
    torch.testing.assert_close(query, query_o)


@every_form
def test_counted_predictions_are_blind_to_their_own_rating(model, reads, head):
    learner, options = build(model, reads, head, n_items=40)
    for task in slices(tiny.training_tasks(options)):

        def history(ratings, task=task):
            return predict(learner, task._replace(ratings=ratings))[0].flatten()

        slopes = torch.autograd.functional.jacobian(history, task.ratings)
        slopes = slopes.flatten(1)
        assert not slopes.diagonal()[task.support.flatten()].any()
        assert slopes.any() == (reads and bool(task.query_last > 0))


@every_form
def test_predictions_are_blind_to_query_ratings_and_other_queries(model, reads, head):
    learner, _ = build(model, reads, head)
    tasks = tiny.lay_out([[4], [2, 1]], query_items=(1, 7, 7, 3))
    history, query = predict(learner, tasks)
    _, other = predict(learner, tasks._replace(query_ratings=tasks.query_ratings + 1))
    torch.testing.assert_close(query, other, rtol=0, atol=0)
    for place in range(4):
        single = tasks._replace(query_items=tasks.query_items[[place]])
        history_s, query_s = predict(learner, single)
        torch.testing.assert_close(query_s[0], query[place])
        torch.testing.assert_close(history_s, history)


@every_form
def test_queries_of_all_tasks_alike_and_in_parts_are_predicted_the_same(model, reads, head):
    learner, options = build(model, reads, head, n_items=40)
    tasks, everything = tiny.training_tasks(options), torch.arange(1, 41)
    numbers = tasks.table.gather(1, tasks.items.flatten(1)).view_as(tasks.items)
    tasks = tasks._replace(items=numbers, query_items=everything.expand(len(tasks.table), -1))
    rows = {name: learner.get_parameter(name) for name in learner.table_names()}
    expected = learner.predict(tasks, rows)
    for items, at_once in ((everything, None), (everything, 7), (tasks.query_items, 7)):
        found = learner.predict(tasks._replace(query_items=items), rows, at_once=at_once)
        torch.testing.assert_close(found, expected)


@every_form
def test_causal_learners_are_blind_to_later_items_and_ratings(model, reads, head):
    learner, _ = build(model, reads, head)
    tasks = tiny.lay_out([[6]], query_items=(3,))
    first, query = predict(learner, tasks)
    for t in range(6):
        items, ratings = tasks.items.clone(), tasks.ratings.clone()
        items[0, t] = items[0, t] % 9 + 1
        ratings[0, t] += 1
        changed = predict(learner, tasks._replace(items=items, ratings=ratings))
        difference = (changed[0] - first).abs()[0]
        assert difference[t] > 1e-9
        if t > 0:
            assert learner.encoder.causal == (not difference[:t].any())
        assert (changed[1] - query).abs().max() > 1e-9


@pytest.mark.parametrize("model", ["sasrec", "narm", "gru4rec"])
def test_causal_learners_read_earlier_ratings(model):
    learner, _ = build(model, reads=True)
    tasks = tiny.lay_out([[6]], query_items=(3,))

    def history(ratings):
        return predict(learner, tasks._replace(ratings=ratings))[0][0]

    reads = torch.autograd.functional.jacobian(history, tasks.ratings)[:, 0].abs() > 1e-12
    assert torch.equal(reads, torch.ones(6, 6, dtype=torch.bool).tril(-1))


def test_cloze_reads_the_ratings_that_are_not_hidden():
    learner, _ = build("bert4rec", reads=True)
    known = torch.tensor([[True, False, True, True, False]])
    tasks = tiny.lay_out([[5]], query_items=(3,))._replace(known=known)

    def history(ratings):
        return predict(learner, tasks._replace(ratings=ratings))[0][0]

    reads = torch.autograd.functional.jacobian(history, tasks.ratings)[:, 0].abs() > 1e-12
    assert torch.equal(reads, known.expand(5, 5))


def test_narm_equals_a_loop_over_positions():
    options = tiny.options(model="narm", narm_n_layers=2)
    narm = tiny.jitter(NARM(options))
    tasks = tiny.lay_out([[6]], width=7)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 8, generator=generator, dtype=torch.float64)
    query = torch.randn(2, 8, generator=generator, dtype=torch.float64)

    def run(layers, sequence):
        for layer in layers:
            state, states = torch.zeros(8, dtype=torch.float64), []
            for x in sequence:
                state = layer.step(layer.input(x), state)
                states.append(state)
            sequence = states
        return sequence

    def last(sequence):
        heads, past = run(narm.globals, sequence)[-1], run(narm.locals, sequence)
        local = sum(
            narm.similarity(torch.sigmoid(narm.at_target(past[-1]) + narm.at_past(state))) * state for state in past
        )
        return narm.norm(narm.decode(torch.cat([heads, local])))

    states, memory = narm.read(inputs[None], tasks)
    after = narm.ask(query, memory)
    for t in range(6):
        torch.testing.assert_close(states[0, t], last(inputs[: t + 1]))
    for one, got in zip(query, after, strict=True):
        torch.testing.assert_close(got, last([*inputs[:6], one]))


def test_joint_head_is_the_sum_of_its_terms():
    learner, _ = build("sasrec", head="joint")
    head, state, items = learner.head, torch.randn(4, 8, dtype=torch.float64), torch.tensor([1, 5, 5, 9])
    rows = {name: table[items] for name, table in learner.tables().items()}
    of_each = zip(head(state, rows), state, rows["item_effect"][:, 0], rows["item_factor"], strict=True)
    for prediction, h, effect, factor in of_each:
        vector = head.user_vector + head.to_vector.weight @ h
        expected = effect + head.user_bias + factor @ vector
        torch.testing.assert_close(prediction, expected + head.state_weight @ h)


@pytest.mark.parametrize("windows", [1, 5])  # one row a task, or several
@pytest.mark.parametrize(
    ("reads", "head", "heads"), [(False, "plain", 0), (False, "joint", 0), (False, "joint", 2), (True, "joint", 2)]
)
@pytest.mark.parametrize("model", tiny.LEARNERS)
def test_predictions_are_inner_products_with_what_the_head_adapts(model, reads, head, heads, windows):
    learner, options = build(model, reads, head, n_items=40, error_heads=heads, num_samples=windows, num_masks=2)
    tasks = tiny.training_tasks(options)
    assert (tasks.items.shape[1] > 1) == (windows > 1 or (reads and model == "bert4rec"))
    assert not tasks.query.all() and (tasks.segment == 0).any()
    adapted = [learner.get_parameter(name).flatten() for name in learner.head.adapted]
    one = torch.cat([torch.ones(1, dtype=torch.float64), *adapted])
    linear = [values @ one for values in learner.linear(tasks, tables(learner, tasks))]
    outs = []
    for history, query in (linear, predict(learner, tasks)):
        out = torch.cat([history[tasks.segment > 0], query[tasks.query]])
        slopes = torch.autograd.grad(out.square().sum(), list(learner.parameters()), materialize_grads=True)
        outs.append((out, slopes))
    torch.testing.assert_close(*outs)


def test_windows_of_one_row_do_not_continue_each_other():
    assert continues(tiny.lay_out([[2, 3, 1]])).tolist() == [[0, 1, 0, 1, 1, 0]]


def test_initial_weights_hang_on_their_seed_alone():
    options = tiny.options(head="joint")
    first = Learner(9, options).state_dict()
    torch.manual_seed(1)
    again, other = (
        Learner(9, options).state_dict(),
        Learner(9, tiny.options(head="joint", model_init_seed=6)).state_dict(),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["item_embedding"], other["item_embedding"])
    assert not first["item_embedding"][0].any()
