"""Compiled steps on disk: given back as they were, to nobody who could use them wrongly."""

import os

import jax
import jax.numpy as jnp
import pytest

from jax_engine.compilation import Program, build
from jax_engine.step_store import StepStore

X = jax.ShapeDtypeStruct((4,), jnp.float32)


class Counted:
    """A small program, and how often it was lowered."""

    def __init__(self, name="one"):
        self.lowered = 0
        self.program = Program(name, (X, {"b": X}), {"sum": 0, "product": 0}, self._lower)

    def _lower(self):
        self.lowered += 1
        return jax.jit(lambda a, more: {"sum": a + more["b"], "product": a * more["b"]}).lower(X, {"b": X})

    def run(self, store):
        """What the built program gives for ones and twos."""
        compiled = build({"only": self.program}, store, "cpu", "program")["only"]
        with jax.transfer_guard("allow"):
            out = compiled(jnp.ones(4), {"b": jnp.full(4, 2.0)})
            return float(out["sum"][0]), float(out["product"][0])


@pytest.fixture
def make_store(tmp_path):
    return lambda *facts: StepStore(tmp_path / "steps", jax.devices()[:1], *facts)


def test_a_program_is_lowered_once(make_store):
    first, second = Counted(), Counted()
    assert first.run(make_store("a")) == second.run(make_store("a")) == (3, 2)
    assert (first.lowered, second.lowered) == (1, 0)


def test_other_facts_name_and_arguments_have_entries_of_their_own(make_store):
    Counted().run(make_store("a"))
    other_facts, other_name = Counted(), Counted("two")
    other_facts.run(make_store("b"))
    other_name.run(make_store("a"))
    assert other_facts.lowered == other_name.lowered == 1
    program = Counted().program
    assert make_store("a").load(program.name, program.arguments, program.results) is not None
    wider = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert make_store("a").load(program.name, (wider, {"b": wider}), program.results) is None


def test_a_damaged_entry_is_made_anew(make_store, tmp_path, caplog):
    Counted().run(make_store())
    (file,) = (tmp_path / "steps").glob("*.step")
    file.write_bytes(file.read_bytes()[:100])
    again = Counted()
    assert again.run(make_store()) == (3, 2) and again.lowered == 1
    assert "compiled anew" in caplog.text
    third = Counted()
    third.run(make_store())
    assert third.lowered == 0


@pytest.mark.parametrize("target", ["folder", "file"])
def test_what_others_could_have_written_is_not_run(make_store, tmp_path, target):
    Counted().run(make_store())
    folder = tmp_path / "steps"
    (file,) = folder.glob("*.step")
    assert file.stat().st_mode & 0o077 == 0 and folder.stat().st_mode & 0o077 == 0
    os.chmod(folder if target == "folder" else file, 0o777)
    again = Counted()
    again.run(make_store())
    assert again.lowered == 1


def test_results_of_another_form_are_not_kept(make_store):
    wrong = Counted()
    wrong.program = Program(wrong.program.name, wrong.program.arguments, {"sum": 0}, wrong.program.lower)
    wrong.run(make_store())
    program = Counted().program
    assert make_store().load(program.name, program.arguments, program.results) is None


def test_old_entries_are_deleted(make_store, tmp_path):
    Counted().run(make_store())
    (file,) = (tmp_path / "steps").glob("*.step")
    os.utime(file, (1, 1))
    make_store()
    assert not file.exists()


def test_steps_and_samplers_have_the_form_that_is_stored(one_bucket):
    runner = one_bucket.runner
    for bucket, (_, compiled) in runner._steps.items():
        _, program = runner._program.step(bucket, runner.limits)
        assert compiled.out_tree == jax.tree.structure(program.results)
        assert compiled.in_tree == jax.tree.structure((program.arguments, {}))
        sharding = compiled.output_shardings[1].logits
        _, sampler = runner._program.sampler(bucket.num_seqs, runner.limits, sharding)
        assert runner._samplers[bucket.num_seqs][1].out_tree == jax.tree.structure(sampler.results)
