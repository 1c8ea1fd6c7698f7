"""Trip counts from Triton IR."""

import pytest

from crosstile.bench.trips import Counter
from crosstile.bench.triton_ir import TripsError

CAUSAL = """\
module {
  tt.func public @kernel(%q: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("q"(#loc)), %size: i32 loc(#loc)) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c1 = arith.constant 1 : i32
    %c16 = arith.constant 16 : i32
    %zero = arith.constant dense<0.0> : tensor<16x16xf32>
    %program = tt.get_program_id x : i32
    %first = arith.muli %program, %c16 : i32
    %end = arith.addi %first, %c16 : i32
    %any = arith.cmpi sgt, %first, %c0 : i32
    %0 = scf.if %any -> (tensor<16x16xf32>) {
      %1 = scf.for %j = %c0 to %first step %c16 iter_args(%acc = %zero) -> (tensor<16x16xf32>)  : i32 {
        %2 = tt.load %q : tensor<16x16x!tt.ptr<bf16>>
        %3 = tt.dot %2, %2, %acc : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32>
        %4 = "tt.reduce"(%3) <{axis = 1 : i32}> ({
        ^bb0(%a: f32, %b: f32):
          %5 = arith.addf %a, %b : f32
          tt.reduce.return %5 : f32
        }) : (tensor<16x16xf32>) -> tensor<16xf32>
        scf.yield %3 : tensor<16x16xf32>
      }
      scf.yield %1 : tensor<16x16xf32>
    } else {
      scf.yield %zero : tensor<16x16xf32>
    }
    %last:2 = scf.for %j = %first to %end step %c1 iter_args(%acc = %0, %at = %c0) -> (tensor<16x16xf32>, i32)  : i32 {
      %next = arith.addi %at, %c16 : i32
      scf.yield %acc, %next : tensor<16x16xf32>, i32
    }
    scf.for %j = %c0 to %last#1 step %c16  : i32 {
      tt.store %q, %zero : tensor<16x16x!tt.ptr<bf16>>
    }
    tt.return
  }
}
"""

LOADED = """\
module {
  tt.func public @kernel(%ends: !tt.ptr<i32>) {
    %c0 = arith.constant 0 : i32
    %c1 = arith.constant 1 : i32
    %program = tt.get_program_id x : i32
    %at = tt.addptr %ends, %program : !tt.ptr<i32>, i32
    %end = tt.load %at : !tt.ptr<i32>
    %none = arith.cmpi eq, %end, %c0 : i32
    cf.cond_br %none, ^bb1, ^bb2
  ^bb1:  // pred: ^bb0
    tt.return
  ^bb2:  // pred: ^bb0
    scf.for %j = %c0 to %end step %c1  : i32 {
    }
    %count = scf.while (%n = %end) : (i32) -> i32 {
      %more = arith.cmpi sgt, %n, %c0 : i32
      scf.condition(%more) %n : i32
    } do {
    ^bb0(%n: i32):
      %less = arith.subi %n, %c1 : i32
      scf.yield %less : i32
    }
    tt.return
  }
}
"""


def test_bounds_branches_and_what_loops_carry() -> None:
    counter = Counter(CAUSAL)
    assert [counter.count({"size": 64}, (p,), (4,)) for p in (0, 3)] == [{0: 0, 1: 16, 2: 16}, {0: 3, 1: 16, 2: 16}]


def test_work_of_an_iteration() -> None:
    work = Counter(CAUSAL).work
    assert work[0].multiplications == 16**3
    assert work[0].loaded == 16 * 16 * 2
    assert work[2].stored == 16 * 16 * 2
    assert work[1].multiplications == 0


def test_loops_that_loaded_values_steer() -> None:
    counter = Counter(LOADED)
    assert counter.count({}, (1,), (2,), lambda name, offset: {("ends", 1): 5}[name, offset]) == {0: 5, 1: 5}
    assert counter.count({}, (0,), (2,), lambda name, offset: 0) == {0: 0, 1: 0}
    with pytest.raises(TripsError, match="loaded"):
        counter.count({}, (0,), (2,))
