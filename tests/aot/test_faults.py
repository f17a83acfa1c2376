"""The faults that this suite is there for, planted one by one in a few layers of real width: each is caught."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compile_cases import Case, large_collectives, lowered, moved_inputs, networks, topology
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dflash.compiled.programs import Compiled, compile_program, device_bytes
from dflash.models import mesh
from dflash.models.layers import Linear
from dflash.models.llama import Llama

SMALL = Case(target="gpt-oss-20b", topology="v6e:2x4", tp=8, program="greedy", layers=2)
BLOCK = Case(target="qwen3-8b", topology="v6e:2x4", tp=8, program="block", layers=6, draft_layers=2)


def _compile(case: Case) -> Compiled:
    """Anew: a planted fault must not meet what was compiled without it."""
    made = compile_program(lowered(case))
    assert isinstance(made, Compiled)
    return made


@pytest.fixture(autouse=True)
def _no_traces_are_shared() -> Any:
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_without_a_fault_nothing_is_found() -> None:
    program = _compile(SMALL)
    assert program.unaliased("state.cache") == []
    assert large_collectives(program, SMALL) == []


def test_a_replicated_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    split = networks(BLOCK)
    monkeypatch.setattr(mesh, "RULES", mesh.RULES | dict.fromkeys(("heads", "kv_heads", "inner", "features")))
    whole = networks(BLOCK)
    assert device_bytes(nnx.state(whole.draft)) > 4 * device_bytes(nnx.state(split.draft))


def test_experts_split_without_a_rule() -> None:
    """As `jit` alone spreads them: weights split along their first axis, and no word about what follows."""
    one = networks(dataclasses.replace(SMALL, topology="v6e:1x1", tp=1, layers=1))
    graph, weights = nnx.split(one.target)
    devices = mesh.make_mesh(topology(SMALL.topology).devices, tp=8)

    def spread(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        split = P("tp") if len(a.shape) == 3 else P()
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(devices, split))

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=NamedSharding(devices, P()))

    def experts(weights: Any, tokens: Array) -> Array:
        return nnx.merge(graph, weights).hidden(tokens)[0]

    program = compile_program(jax.jit(experts).lower(jax.tree.map(spread, weights), tokens))
    assert isinstance(program, Compiled)
    gathered = [m for m in program.moves if m.kind.startswith("all-") and "gate_up" in m.origin]
    assert gathered or program.step.collectives["all-gather"][1] > 1e8


def test_a_forgotten_donation(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, donate_argnums=(), **options: jit(f, **options))
    assert _compile(SMALL).unaliased("state.cache")


def test_gathered_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "most_likely", lambda self, x: jnp.argmax(self.logits(x), axis=0).astype(jnp.int32))
    assert large_collectives(_compile(SMALL), SMALL)  # the compiler may make a reduction of the gather


def test_a_weight_converted_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def widened(self: Linear, x: Array) -> Array:
        wide = jax.lax.optimization_barrier(self.weight[...].astype(jnp.float32))
        return (wide @ x.astype(jnp.float32)).astype(x.dtype)

    clean = set(moved_inputs(_compile(SMALL)))
    jax.clear_caches()
    monkeypatch.setattr(Linear, "__call__", widened)
    assert any("convert" in found or "fusion" in found for found in set(moved_inputs(_compile(SMALL))) - clean)


def test_a_weight_that_lies_as_it_takes_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(SMALL, program="sequential", draft_layers=1)
    assert moved_inputs(_compile(case)) == []
    jax.clear_caches()
    monkeypatch.setattr(mesh, "in_order", lambda devices, split, order: NamedSharding(devices, split))
    assert any(found.startswith("before the loop: copy of weights") for found in moved_inputs(_compile(case)))
