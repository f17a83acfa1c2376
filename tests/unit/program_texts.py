"""Compiled programs in a few lines, as the TPU's compiler writes them."""

# A greedy loop: a product on the matrix unit, one on the vector unit, a weight read ahead into VMEM, an in-place update
# of the cache, a row of the embedding, a norm converted, a reduction over devices; before it a weight is copied.
LOOP = """\
HloModule jit_loop, is_scheduled=true, input_output_alias={ {0}: (3, {}, may-alias) }, \
entry_computation_layout={()->()}, num_partitions=8

%product (q.0: bf16[1024,512], q.1: bf16[512,16]) -> bf16[1024,16] {
  %q.0 = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(0)
  %q.1 = bf16[512,16]{0,1:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution = bf16[1024,16]{0,1:T(8,128)(2,1)S(1)} convolution(%q.0, %q.1), dim_labels=bf_io->bf
}

%column (r.0: bf16[1024,512], r.1: bf16[512]) -> bf16[1024] {
  %r.0 = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(0)
  %r.1 = bf16[512]{0:T(512)(128)(2,1)S(1)} parameter(1)
  %wide = bf16[1024,512]{1,0:T(8,128)(2,1)} broadcast(%r.1), dimensions={1}
  %times = bf16[1024,512]{1,0:T(8,128)(2,1)} multiply(%r.0, %wide)
  %zero = bf16[] constant(0)
  ROOT %sum = bf16[1024]{0:T(1024)(128)(2,1)S(1)} reduce(%times, %zero), dimensions={1}, to_apply=%add
}

%rows (e.0: bf16[2048,512], e.1: s32[]) -> bf16[512] {
  %e.0 = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(0)
  %e.1 = s32[]{:T(128)} parameter(1)
  %nothing = s32[]{:T(128)} constant(0)
  %taken = bf16[1,512]{1,0:T(2,128)(2,1)} dynamic-slice(%e.0, %e.1, %nothing), dynamic_slice_sizes={1,512}
  ROOT %row = bf16[512]{0:T(512)(128)(2,1)S(1)} bitcast(%taken)
}

%deep (d.0: bf16[2048,512], d.1: s32[]) -> bf16[512] {
  %d.0 = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(0)
  %d.1 = s32[]{:T(128)} parameter(1)
  ROOT %nested = bf16[512]{0:T(512)(128)(2,1)S(1)} fusion(%d.0, %d.1), kind=kLoop, calls=%rows
}

%write (u.0: bf16[1,4,256,128], u.1: bf16[1,4,1,128], u.2: s32[]) -> bf16[1,4,256,128] {
  %u.0 = bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %u.1 = bf16[1,4,1,128]{3,2,1,0:T(2,128)(2,1)S(1)} parameter(1)
  %u.2 = s32[]{:T(128)} parameter(2)
  %none = s32[]{:T(128)} constant(0)
  ROOT %put = bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)} dynamic-update-slice(%u.0, %u.1, %none, %none, %u.2, %none)
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %ab = bf16[]{:T(256)} add(%a, %b)
}

%body (t: (s32[], bf16[1024,512], bf16[2048,512], bf16[1,4,256,128], bf16[512])) -> (s32[], bf16[1024,512], \
bf16[2048,512], bf16[1,4,256,128], bf16[512]) {
  %t = (s32[]{:T(128)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, bf16[2048,512]{1,0:T(8,128)(2,1)}, \
bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)}, bf16[512]{0:T(512)(128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %w = bf16[1024,512]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %e = bf16[2048,512]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %k = bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=3
  %n = bf16[512]{0:T(512)(128)(2,1)} get-tuple-element(%t), index=4
  %ahead = (bf16[1024,512]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %embedded = bf16[512]{0:T(512)(128)(2,1)S(1)} fusion(%e, %i), kind=kLoop, calls=%deep, \
metadata={op_name="jit(loop)/while/body/embed/gather"}
  %norm = f32[512]{0:T(512)} convert(%n), metadata={op_name="jit(loop)/while/body/convert"}
  %thick = bf16[512,16]{0,1:T(8,128)(2,1)S(1)} custom-call(%embedded), custom_call_target="AllocateBuffer"
  %many = bf16[1024,16]{0,1:T(8,128)(2,1)S(1)} fusion(%w, %thick), kind=kOutput, calls=%product, \
metadata={op_name="jit(loop)/while/body/verify/dot"}, backend_config={"window_config":{"estimated_cycles":"5000"}}
  %arrived = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%ahead)
  %one = bf16[1024]{0:T(1024)(128)(2,1)S(1)} fusion(%w, %embedded), kind=kLoop, calls=%column, \
metadata={op_name="jit(loop)/while/body/propose/dot"}, backend_config={"window_config":{"estimated_cycles":"99999"}}
  %all = bf16[1024]{0:T(1024)(128)(2,1)S(1)} all-reduce(%one), channel_id=1, to_apply=%add, \
metadata={op_name="jit(loop)/while/body/verify/psum"}
  %gathering = (bf16[1024,512]{1,0:T(8,128)(2,1)}, bf16[8192,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
all-gather-start(%w), channel_id=2, dimensions={0}
  %gathered = bf16[8192,512]{1,0:T(8,128)(2,1)} all-gather-done(%gathering)
  %kernel = bf16[1,4,1,128]{3,2,1,0:T(2,128)(2,1)S(1)} custom-call(%gathered, %many), \
custom_call_target="tpu_custom_call"
  %kept = bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)} fusion(%k, %kernel, %i), kind=kLoop, calls=%write
  ROOT %next = (s32[]{:T(128)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, bf16[2048,512]{1,0:T(8,128)(2,1)}, \
bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)}, bf16[512]{0:T(512)(128)(2,1)}) tuple(%i, %w, %e, %kept, %n)
}

%more (t.1: (s32[])) -> pred[] {
  %t.1 = (s32[]{:T(128)}) parameter(0)
  ROOT %yes = pred[]{:T(512)} constant(true)
}

ENTRY %main (w.1: bf16[1024,512], e.1: bf16[2048,512], n.1: bf16[512], k.1: bf16[1,4,256,128], i.1: s32[]) -> \
bf16[1,4,256,128] {
  %w.1 = bf16[1024,512]{0,1:T(8,128)(2,1)} parameter(0), metadata={op_name="weights[0][\\'up\\'].value"}
  %e.1 = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="weights[0][\\'embedding\\'].value"}
  %n.1 = bf16[512]{0:T(512)(128)(2,1)} parameter(2), metadata={op_name="weights[0][\\'norm\\'].value"}
  %k.1 = bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(3), metadata={op_name="state.cache.keys[0]"}
  %i.1 = s32[]{:T(128)} parameter(4), metadata={op_name="state.step"}
  %turned = bf16[1024,512]{1,0:T(8,128)(2,1)} copy(%w.1)
  %start = (s32[]{:T(128)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, bf16[2048,512]{1,0:T(8,128)(2,1)}, \
bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)}, bf16[512]{0:T(512)(128)(2,1)}) tuple(%i.1, %turned, %e.1, %k.1, %n.1)
  %loop = (s32[]{:T(128)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, bf16[2048,512]{1,0:T(8,128)(2,1)}, \
bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)}, bf16[512]{0:T(512)(128)(2,1)}) while(%start), condition=%more, body=%body
  ROOT %k.2 = bf16[1,4,256,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=3
}
"""

# A loop of known length in a program that is no loop.
COUNTED = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={()->()}

%inner (t: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %t = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[1024]{0:T(1024)} get-tuple-element(%t), index=1
  %y = f32[1024]{0:T(1024)} negate(%x)
  ROOT %n = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) tuple(%i, %y)
}

ENTRY %main (x.1: f32[1024], i.1: s32[]) -> f32[1024] {
  %x.1 = f32[1024]{0:T(1024)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  %s = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) tuple(%i.1, %x.1)
  %loop = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) while(%s), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"4"}}
  ROOT %out = f32[1024]{0:T(1024)} get-tuple-element(%loop), index=1
}
"""
