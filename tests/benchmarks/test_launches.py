"""What a compiled GPU program launches: loops in full, bytes of slices, arithmetic of products."""

import pytest

from benchmarks import launches

# A loop of five over a stack of weights: slice one, multiply (with a bias added by the library),
# activate and write the result in place; and outside of it a product of two fused operands.
HLO = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[64,512]{1,0})->bf16[64,64]{1,0}}

%fused_slice (param_0: bf16[5,512,512], param_1: s32[]) -> bf16[512,512] {
  %param_0 = bf16[5,512,512]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,512,512]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,512,512}
  ROOT %squeezed = bf16[512,512]{1,0} bitcast(%slice)
}

%fused_write (param_0: bf16[5,64,512], param_1: bf16[64,512], param_2: s32[]) -> bf16[5,64,512] {
  %param_0 = bf16[5,64,512]{2,1,0} parameter(0)
  %param_1 = bf16[64,512]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %tanh = bf16[64,512]{1,0} tanh(%param_1)
  %one = bf16[1,64,512]{2,1,0} bitcast(%tanh)
  ROOT %written = bf16[5,64,512]{2,1,0} dynamic-update-slice(%param_0, %one, %param_2, %zero, %zero)
}

%fused_dot (param_0: f32[64,512], param_1: f32[512,64]) -> f32[64,64] {
  %param_0 = f32[64,512]{1,0} parameter(0)
  %param_1 = f32[512,64]{1,0} parameter(1)
  ROOT %dot = f32[64,64]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%next (param_0: s32[]) -> s32[] {
  %param_0 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %sum = s32[] add(%param_0, %one)
}

%body (loop: (s32[], bf16[64,512], bf16[5,512,512], bf16[5,64,512])) -> (s32[], bf16[64,512], bf16[5,512,512], bf16[5,64,512]) {
  %loop = (s32[], bf16[64,512]{1,0}, bf16[5,512,512]{2,1,0}, /*index=3*/bf16[5,64,512]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %x = bf16[64,512]{1,0} get-tuple-element(%loop), index=1
  %weights = bf16[5,512,512]{2,1,0} get-tuple-element(%loop), index=2
  %kept = bf16[5,64,512]{2,1,0} get-tuple-element(%loop), index=3
  %loop_slice_fusion.3 = bf16[512,512]{1,0} fusion(%weights, %i), kind=kLoop, calls=%fused_slice
  %gemm.1 = (bf16[64,512]{1,0}, s8[33554432]{0}) custom-call(%x, %loop_slice_fusion.3), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  %y = bf16[64,512]{1,0} get-tuple-element(%gemm.1), index=0
  %loop_write_fusion = bf16[5,64,512]{2,1,0} fusion(%kept, bf16[64,512]{1,0} %y, %i), kind=kLoop, calls=%fused_write
  %next_i = s32[] fusion(%i), kind=kLoop, calls=%next
  ROOT %out = (s32[], bf16[64,512]{1,0}, bf16[5,512,512]{2,1,0}, bf16[5,64,512]{2,1,0}) tuple(%next_i, %y, %weights, %loop_write_fusion)
}

%condition (loop.1: (s32[], bf16[64,512], bf16[5,512,512], bf16[5,64,512])) -> pred[] {
  %loop.1 = (s32[], bf16[64,512]{1,0}, bf16[5,512,512]{2,1,0}, bf16[5,64,512]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%loop.1), index=0
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (a: bf16[64,512], w: bf16[5,512,512], k: bf16[5,64,512], l: f32[64,512], r: f32[512,64]) -> f32[64,64] {
  %a = bf16[64,512]{1,0} parameter(0), metadata={op_name="a (an argument)"}
  %w = bf16[5,512,512]{2,1,0} parameter(1)
  %k = bf16[5,64,512]{2,1,0} parameter(2)
  %l = f32[64,512]{1,0} parameter(3)
  %r = f32[512,64]{1,0} parameter(4)
  %start = s32[] constant(0)
  %state = (s32[], bf16[64,512]{1,0}, bf16[5,512,512]{2,1,0}, bf16[5,64,512]{2,1,0}) tuple(%start, %a, %w, %k)
  %while = (s32[], bf16[64,512]{1,0}, bf16[5,512,512]{2,1,0}, bf16[5,64,512]{2,1,0}) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %image = bf16[2,8,8,16]{3,2,1,0} custom-call(%l), custom_call_target="fill"
  %kernel = bf16[3,3,16,32]{3,2,1,0} custom-call(%l), custom_call_target="fill"
  %conv = (bf16[2,8,8,32]{3,2,1,0}, u8[1024]{0}) custom-call(%image, %kernel), dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  ROOT %gemm_fusion = f32[64,64]{1,0} fusion(%l, %r), kind=kCustom, calls=%fused_dot
}
"""  # noqa: E501


def found():
    return {x.name: x for x in launches.launches(HLO)[0]}


def test_every_launch_is_counted_as_often_as_its_loop_runs():
    once = {"image", "kernel", "conv", "gemm_fusion"}
    inside = {"loop_slice_fusion.3", "gemm.1", "loop_write_fusion", "next_i"}
    times = {name: x.times for name, x in found().items()}
    assert times == dict.fromkeys(once, 1) | dict.fromkeys(inside, 5)
    assert launches.launches(HLO)[1] == 1  # loops
    unknown = HLO.replace('"known_trip_count":{"n":"5"}', "")
    assert {x.times for x in launches.launches(unknown)[0]} == {1}


def test_bytes_are_those_of_slices_not_of_the_arrays_they_are_cut_from():
    kernel, rows = 512 * 512 * 2, 64 * 512 * 2
    sizes = {name: x.bytes for name, x in found().items()}
    assert sizes["loop_slice_fusion.3"] == 2 * kernel + 4
    assert sizes["loop_write_fusion"] == 2 * rows + 4
    assert sizes["gemm.1"] == kernel + 2 * rows  # the library's scratch memory is none
    assert sizes["gemm_fusion"] == 4 * (2 * 64 * 512 + 64 * 64)


def test_products_and_their_arithmetic():
    work = {name: (x.kind, x.flops) for name, x in found().items() if x.flops}
    assert work == {
        "gemm.1": ("gemm", 2 * 64 * 512 * 512),
        "gemm_fusion": ("gemm", 2 * 64 * 64 * 512),
        "conv": ("convolution", 2 * (2 * 8 * 8 * 32) * (3 * 3 * 16)),
    }


def test_a_launch_takes_the_longest_of_its_three_times():
    quick = launches.H100
    assert found()["next_i"].seconds == quick.launch_s
    gib = HLO.replace("[5,64,512]", "[5,64,1048576]").replace("[64,512]", "[64,1048576]")
    large = {x.name: x for x in launches.launches(gib)[0]}
    assert large["loop_write_fusion"].seconds == large["loop_write_fusion"].bytes / quick.memory
    # a product whose tiles fill one wave and no more, at the peak
    whole = launches._share((128 * 12, 256 * 11), 512)
    assert whole == 1
    assert launches._share((128 * 12 + 1, 256 * 11), 512) < 0.6  # a second, nearly empty wave


def test_numbers_of_a_program():
    rows = launches.launches(HLO)[0]
    numbers = launches.summary(HLO)
    gemms = [x for x in rows if x.name in ("gemm.1", "gemm_fusion", "conv")]
    assert numbers["launches"] == 5 * 4 + 4 and numbers["gemm_launches"] == 5 + 2
    assert numbers["gemm_gib"] == sum(x.times * x.bytes for x in gemms) / 2**30
    together = numbers["gemm_gib"] + numbers["other_gib"]
    assert together == pytest.approx(sum(x.times * x.bytes for x in rows) / 2**30)
    assert 1e-3 * numbers["estimate_ms"] == pytest.approx(
        sum(x.times * x.seconds for x in rows) + launches.H100.loop_s
    )


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        launches.summary("HloModule empty\n")


def test_the_branch_of_a_condition_that_launches_most_counts():
    text = """HloModule jit_g

%two (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %once = f32[4]{0} copy(%p)
  ROOT %twice = f32[4]{0} copy(%once)
}

%none (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

ENTRY %main (a: f32[4], c: pred[]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %c = pred[] parameter(1)
  ROOT %either = f32[4]{0} conditional(%c, %a, %a), true_computation=%none, false_computation=%two
}
"""
    assert launches.summary(text)["launches"] == 2
    listed = text.replace("true_computation=%none, false_computation=%two",
                          "branch_computations={%two, %none}")  # fmt: skip
    assert launches.summary(listed)["launches"] == 2
