// y = x W^T for a few tokens: the weight is streamed once, at the speed of memory. GATED: the first
// half of the rows of W gives gates, the second what they scale, and y = gelu(gate) * up.
//
// A block owns 8 * ROW_TILES rows of W, half of them gates if GATED, and its warps share the columns: warp v takes the chunks v,
// v + WARPS, ... of CHUNK columns. Each warp copies its chunks through a ring of STAGES in shared
// memory that no other warp touches, multiplies them on the tensor cores and keeps fp32 sums; the
// block adds the sums of its warps in the order of the warps. So the order of every sum depends on
// the number of columns and on WARPS alone: not on the tokens, on ROW_TILES or on STAGES.
//
// A weight is constant: its first stages are on their way before the kernel waits for the one
// ahead of it on the stream (programmatic dependent launch), which may still be writing x.
//
// The columns of a product may be taken in any order, if x and W agree. A thread holds 8 columns
// that lie side by side, 16 bytes, where the instruction's own layout has two pairs in each half
// of 16: so one load feeds two instructions, and none is narrower than 16 bytes.

typedef unsigned int uint32;
typedef long long int64;

struct Args {
  const unsigned short* x;  // [tokens, columns] bf16, rows x_stride elements apart
  const unsigned short* w;  // [rows, columns] bf16, rows w_stride elements apart
  unsigned short* y;        // [tokens, rows], GATED: [tokens, rows / 2]; bf16, contiguous
  int64 x_stride, w_stride;
  int tokens, rows, columns;
};

constexpr int ROWS = 8 * ROW_TILES;                // of W, in a block
constexpr int OUTPUTS = GATED ? ROWS / 2 : ROWS;   // of a block, for each token
constexpr int ROW_BYTES = CHUNK * 2;               // of a stage
constexpr int UNITS = CHUNK / 8;                   // of 16 bytes, in a row of a stage
constexpr int COPIES = ROWS * UNITS / 32;          // of 16 bytes, for each thread, in a stage of W
constexpr int TOKENS = MANY ? 16 : 8;              // that the sums have room for

// Two rows of 64 bytes that a quarter of a warp reads at once lie in different banks.
__device__ uint32 place(int row, int unit) { return row * ROW_BYTES + ((unit ^ ((row & 1) * 4)) << 4); }

__device__ void copy(uint32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ uint4 read(uint32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

// c [16 tokens, 8 rows] += a [16 tokens, 16 columns] b [8 rows, 16 columns]^T
__device__ void multiply(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ unsigned short rounded(float v) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

__device__ float as_bf16(float v) { return __uint_as_float((uint32)rounded(v) << 16); }

// gelu with tanh, as torch has it, times up: both rounded to bf16 before, in fp32 from there on.
__device__ float gated(float gate, float up) {
  const float g = as_bf16(gate), u = as_bf16(up);
  const float inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
  return 0.5f * g * (1.f + tanhf(inner)) * u;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) linear(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) unsigned char stages[];  // [WARPS, STAGES, ROWS + tokens, CHUNK] bf16
  __shared__ float sums[WARPS][TOKENS][ROWS + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quad = lane % 4;  // the row or token, and the 8 columns, of a thread
  const int first = blockIdx.x * OUTPUTS, outputs = GATED ? a.rows / 2 : a.rows;
  const int turns = (a.columns / CHUNK - warp + WARPS - 1) / WARPS;
  const int stage = (ROWS + a.tokens) * ROW_BYTES;
  const uint32 mine = (uint32)__cvta_generic_to_shared(stages) + warp * (STAGES * stage);

  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  auto fetch_w = [&](int turn, uint32 to) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const int at = i * 32 + lane, row = at / UNITS, unit = at % UNITS;
      const int from = min(first + row % OUTPUTS, outputs - 1) + row / OUTPUTS * outputs;
      copy(to + place(row, unit), a.w + from * a.w_stride + (warp + turn * WARPS) * CHUNK + unit * 8);
    }
  };
  auto fetch_x = [&](int turn, uint32 to) {
    for (int at = lane; at < a.tokens * UNITS; at += 32) {
      const int row = at / UNITS, unit = at % UNITS;
      copy(to + ROWS * ROW_BYTES + place(row, unit),
           a.x + row * a.x_stride + (warp + turn * WARPS) * CHUNK + unit * 8);
    }
  };
  auto commit = [] { asm volatile("cp.async.commit_group;" ::: "memory"); };

#pragma unroll
  for (int s = 0; s < STAGES; s++)
    if (s < turns) fetch_w(s, mine + s * stage);
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    if (s < turns) fetch_x(s, mine + s * stage);
    commit();  // the first group holds every first stage of W, which the wait has brought by now
  }

  float acc[ROW_TILES][4] = {};
  uint32 from = mine;
  int slot = 0;
  for (int turn = 0; turn < turns; turn++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();  // what the other threads of the warp copied is there, too
#pragma unroll
    for (int part = 0; part < CHUNK / 32; part++) {
      const int unit = part * 4 + quad;
      uint4 low = make_uint4(0, 0, 0, 0), high = low;  // tokens 0 to 7, and 8 to 15
      if (group < a.tokens) low = read(from + ROWS * ROW_BYTES + place(group, unit));
      if (MANY && group + 8 < a.tokens) high = read(from + ROWS * ROW_BYTES + place(group + 8, unit));
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; tile++) {
        const uint4 w = read(from + place(8 * tile + group, unit));
        multiply(acc[tile], low.x, high.x, low.y, high.y, w.x, w.y);
        multiply(acc[tile], low.z, high.z, low.w, high.w, w.z, w.w);
      }
    }
    __syncwarp();  // nobody in the warp reads this stage any more
    if (turn + STAGES < turns) {
      fetch_w(turn + STAGES, from);
      fetch_x(turn + STAGES, from);
    }
    commit();  // empty at the end, so that the count of the wait above stays right
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    from = mine + slot * stage;
  }

#pragma unroll
  for (int tile = 0; tile < ROW_TILES; tile++)
#pragma unroll
    for (int i = 0; i < (MANY ? 4 : 2); i++)
      sums[warp][group + 8 * (i / 2)][8 * tile + 2 * quad + i % 2] = acc[tile][i];
  __syncthreads();
  auto total = [&](int token, int row) {
    float sum = sums[0][token][row];
#pragma unroll
    for (int v = 1; v < WARPS; v++) sum += sums[v][token][row];
    return sum;
  };
  for (int at = threadIdx.x; at < a.tokens * OUTPUTS; at += WARPS * 32) {
    const int token = at / OUTPUTS, row = at % OUTPUTS;
    float y = total(token, row);
    if (GATED) y = gated(y, total(token, row + OUTPUTS));
    if (first + row < outputs) a.y[(int64)token * outputs + first + row] = rounded(y);
  }
}
