// All-reduce over peer memory with the norms that follow it, one kernel.
//
// Compiled at run time with: H (elements in a row), WORLD, DTYPE (0 bf16, 1 fp16, 2 fp32), THREADS
// (of a block), BLOCKS (that fit on one
// SM together), VECS (16-byte vectors of a row that one thread holds), FP8 (0 none, 1 one static
// scale, 2 a scale per token). A block works on whole rows.
//
// Data announces itself: a buffer that nothing has arrived in holds EMPTY in every 32-bit word, and
// senders never send that word. Peer stores of 32 bits are single-copy atomic, so a vector has
// arrived when none of its words is EMPTY; there is no flag and no barrier. The reader puts EMPTY
// back. Every row has two slots, used in turn, and counts its own uses. Two are enough:
// a peer fills a row's slot again two uses later, after the use between them; that one it could only
// finish with what this rank sent in it, and this rank sent that after the kernel of the first use,
// which put EMPTY back, had ended.
//
// Every kernel may be launched while the one before it still runs (programmatic dependent launch),
// and reads and sends nothing before that one is over.

typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE static __device__ __forceinline__

constexpr u32 EMPTY = 0xffffffffu;        // as data: NaN in every dtype
constexpr u32 OTHER_NAN = 0x7fff7fffu;    // sent instead: also NaN in every dtype
constexpr int ELEMENTS = DTYPE == 2 ? 4 : 8;  // in 16 bytes
constexpr int VECTORS = H / ELEMENTS;     // in a row
constexpr int WARPS = THREADS / 32;
constexpr int PEERS = WORLD - 1;
constexpr int AHEAD = 4;                  // turns, see `two_shot`
constexpr u32 POLLS_BETWEEN_CLOCKS = 256;
constexpr u32 NAP = 64;                   // nanoseconds at most; polls compete with data for the L2

constexpr bool LATE_GAMMA = MANY || WORLD > 4;  // load gamma when it is needed: fewer registers

enum Op { SUM = 0, ADD_NORM = 1, NORM_ADD_NORM = 2 };

struct Args {
  u64 buffers[WORLD];      // of every rank, mapped here; layout in `Place`
  const char* x;           // [rows, H], row stride x_stride bytes
  const char* residual;    // [rows, H], row stride residual_stride bytes
  const float* post_gamma; // [H], NORM_ADD_NORM only
  const float* pre_gamma;  // [H]
  char* y;                 // [rows, H] of the dtype, or e4m3; contiguous
  char* total;             // [rows, H]: the new residual; contiguous
  float* scale;            // fp32: [1] read (FP8 1), [rows] written (FP8 2)
  u32* uses;               // [rows]: how often this row was used; one array a protocol
  u32* failed;             // [1]: set by the first thread that gives up
  long long x_stride;
  long long residual_stride;
  u64 pitch;               // bytes from one row of a buffer to the next
  u64 timeout_ns;
  int rows;
  int capacity;            // rows that the buffer holds for this protocol
  int rank;
  float post_eps;
  float pre_eps;
};

DEVICE uint4 load_arriving(u64 at) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}

DEVICE void send(u64 at, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1,%2,%3,%4};"
               :: "l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

DEVICE void put_empty(u64 at) {
  asm volatile("st.global.v4.b32 [%0], {%1,%1,%1,%1};" :: "l"(at), "r"(EMPTY) : "memory");
}

DEVICE bool arrived(uint4 v) {
  return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY;
}

DEVICE u32 sendable(u32 word) { return word == EMPTY ? OTHER_NAN : word; }

DEVICE uint4 sendable(uint4 v) {
  return make_uint4(sendable(v.x), sendable(v.y), sendable(v.z), sendable(v.w));
}

DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  // In fp32 the outputs could be a gamma, which the next kernel may read before it waits.
  if (DTYPE != 2) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// ---- 16 bytes of a row as fp32, and back, rounded to nearest even

DEVICE void unpack(uint4 v, float* f) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if DTYPE == 0
    f[2 * i] = __uint_as_float(words[i] << 16);
    f[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
#elif DTYPE == 1
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(f[2 * i]), "=f"(f[2 * i + 1]) : "r"(words[i]));
#else
    f[i] = __uint_as_float(words[i]);
#endif
  }
}

DEVICE uint4 pack(const float* f) {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if DTYPE == 0
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(f[2 * i + 1]), "f"(f[2 * i]));
#elif DTYPE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(f[2 * i + 1]), "f"(f[2 * i]));
#else
    words[i] = __float_as_uint(f[i]);
#endif
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

DEVICE void round_to_dtype(float* f) {
  if (DTYPE != 2) unpack(pack(f), f);
}

// ---- reductions over a row: its threads, then its warps, always in this order

struct Add {
  DEVICE float of(float a, float b) { return a + b; }
};

struct Larger {  // NaN wins: a row with a NaN gets a NaN scale
  DEVICE float of(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
  }
};

template <class Combine> DEVICE float over_warp(float value) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1)
    value = Combine::of(value, __shfl_xor_sync(~0u, value, lane));
  return value;
}

// Two scratch rows in turn: a warp may still read the last one's when the next is written.
template <class Combine> DEVICE float over_row(float value, float (&scratch)[2][32], int& turn) {
  value = over_warp<Combine>(value);
  const int lane = threadIdx.x & 31;
  if (lane == 0) scratch[turn][threadIdx.x >> 5] = value;
  __syncthreads();
  value = lane < WARPS ? scratch[turn][lane] : 0.f;
  turn ^= 1;
  return over_warp<Combine>(value);
}

DEVICE float inverse_rms(const float (&f)[VECS][ELEMENTS], float eps, float (&scratch)[2][32],
                         int& turn) {
  float squares = 0.f;
#pragma unroll
  for (int v = 0; v < VECS; v++)
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) squares += f[v][i] * f[v][i];
  const float mean = over_row<Add>(squares, scratch, turn) / float(H) + eps;
  return DTYPE == 2 ? __fdiv_rn(1.f, __fsqrt_rn(mean)) : rsqrtf(mean);
}

// ---- a row of one thread: VECS vectors, THREADS apart

struct Gammas {
  float post[VECS][ELEMENTS];
  float pre[VECS][ELEMENTS];
};

DEVICE bool owns(int v) { return (v + 1) * THREADS <= VECTORS || v * THREADS + threadIdx.x < VECTORS; }

DEVICE u64 vector_offset(int v) { return 16ull * (v * THREADS + threadIdx.x); }

DEVICE uint4 load_vector(const char* row, int v) {
  return *reinterpret_cast<const uint4*>(row + vector_offset(v));
}

// This thread's vectors of a row; zeros beyond its end, and where the row is not wanted at all.
template <bool WANTED = true> DEVICE void load_row(const char* row, uint4 (&to)[VECS]) {
#pragma unroll
  for (int v = 0; v < VECS; v++) {
    to[v] = make_uint4(0, 0, 0, 0);
    if (WANTED && owns(v)) to[v] = load_vector(row, v);
  }
}

DEVICE void load_gamma(float (&to)[VECS][ELEMENTS], const float* gamma) {
#pragma unroll
  for (int v = 0; v < VECS; v++)
#pragma unroll
    for (int i = 0; i < ELEMENTS / 4; i++) {
      float4 g = make_float4(0.f, 0.f, 0.f, 0.f);
      if (owns(v)) g = reinterpret_cast<const float4*>(gamma)[(v * THREADS + threadIdx.x) * (ELEMENTS / 4) + i];
      to[v][4 * i] = g.x; to[v][4 * i + 1] = g.y; to[v][4 * i + 2] = g.z; to[v][4 * i + 3] = g.w;
    }
}

DEVICE void store_fp8(char* row, int v, const float* f) {
  u32 words[2];
#pragma unroll
  for (int i = 0; i < ELEMENTS / 4; i++) {
    unsigned short lo, hi;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(lo) : "f"(f[4 * i + 1]), "f"(f[4 * i]));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(hi) : "f"(f[4 * i + 3]), "f"(f[4 * i + 2]));
    words[i] = lo | (u32(hi) << 16);
  }
  const u64 at = vector_offset(v) / (16 / ELEMENTS);
  if (ELEMENTS == 8) *reinterpret_cast<uint2*>(row + at) = make_uint2(words[0], words[1]);
  else *reinterpret_cast<u32*>(row + at) = words[0];
}

// What follows the sum of a row. `sum` holds it in fp32, not rounded yet.
template <int OP>
DEVICE void finish(const Args& a, int row, float (&sum)[VECS][ELEMENTS],
                   const uint4 (&residual)[VECS], Gammas& gammas, float (&scratch)[2][32],
                   int& turn) {
  char* y = a.y + u64(row) * H * (FP8 && OP != SUM ? 1 : 16 / ELEMENTS);
#pragma unroll
  for (int v = 0; v < VECS; v++) round_to_dtype(sum[v]);
  if (OP == SUM) {
#pragma unroll
    for (int v = 0; v < VECS; v++)
      if (owns(v)) *reinterpret_cast<uint4*>(y + vector_offset(v)) = pack(sum[v]);
    return;
  }
  if (OP == NORM_ADD_NORM) {
    const float rstd = inverse_rms(sum, a.post_eps, scratch, turn);
    if (LATE_GAMMA) load_gamma(gammas.post, a.post_gamma);
#pragma unroll
    for (int v = 0; v < VECS; v++) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; i++) sum[v][i] = sum[v][i] * rstd * gammas.post[v][i];
      round_to_dtype(sum[v]);
    }
  }
  char* total = a.total + u64(row) * H * (16 / ELEMENTS);
#pragma unroll
  for (int v = 0; v < VECS; v++) {
    float r[ELEMENTS];
    unpack(residual[v], r);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) sum[v][i] = r[i] + sum[v][i];
    const uint4 packed = pack(sum[v]);
    if (owns(v)) *reinterpret_cast<uint4*>(total + vector_offset(v)) = packed;
    unpack(packed, sum[v]);
  }
  const float rstd = inverse_rms(sum, a.pre_eps, scratch, turn);
  if (LATE_GAMMA) load_gamma(gammas.pre, a.pre_gamma);
#pragma unroll
  for (int v = 0; v < VECS; v++)
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) sum[v][i] = sum[v][i] * rstd * gammas.pre[v][i];
  if (FP8 == 0) {
#pragma unroll
    for (int v = 0; v < VECS; v++)
      if (owns(v)) *reinterpret_cast<uint4*>(y + vector_offset(v)) = pack(sum[v]);
    return;
  }
  float scale = 0.f;
#pragma unroll
  for (int v = 0; v < VECS; v++) {
    round_to_dtype(sum[v]);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) scale = Larger::of(scale, fabsf(sum[v][i]));
  }
  if (FP8 == 2) {
    scale = Larger::of(over_row<Larger>(scale, scratch, turn) / 448.f, 1.f / (448.f * 512.f));
    if (threadIdx.x == 0) a.scale[row] = scale;
  } else {
    scale = *a.scale;
  }
  const float inverse = 1.f / scale;
#pragma unroll
  for (int v = 0; v < VECS; v++) {
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) sum[v][i] = sum[v][i] * inverse;
    if (owns(v)) store_fp8(y, v, sum[v]);
  }
}

// ---- waiting

extern "C" __device__ void __assertfail(const char*, const char*, unsigned, const char*, size_t)
    __attribute__((noreturn));

// Stops the process: whatever this rank computed from now on would be wrong. The driver prints the
// message of the first thread that gives up; the others wait for their end.
DEVICE void give_up(const Args& a, int source) {
  static const char* const NAMES[] = {
    "no data from rank 0 in time", "no data from rank 1 in time", "no data from rank 2 in time",
    "no data from rank 3 in time", "no data from rank 4 in time", "no data from rank 5 in time",
    "no data from rank 6 in time", "no data from rank 7 in time"};
  if (atomicExch(a.failed, u32(source) + 1) == 0)
    __assertfail(NAMES[source], "gemma_fold all-reduce on rank", a.rank, "all_reduce", 1);
}

// Which of the WORLD - 1 places for what others send holds what `source` sends to `target`.
DEVICE int place_of(int source, int target) { return source < target ? source : source - 1; }

DEVICE int rank_at(int place, int target) { return place < target ? place : place + 1; }

DEVICE int neighbour(int rank, int k) { return rank + k < WORLD ? rank + k : rank + k - WORLD; }

// Polls N places of each vector, `step` bytes apart, until all are there, and empties them.
// `source` is the rank that fills the only place, or -1: then they are the places of all peers.
template <int N>
DEVICE void receive(const Args& a, u64 first, u64 step, int source, uint4 (&got)[VECS][N]) {
  u32 polls = 0;
  u64 start = 0;
  while (true) {
    bool complete = true;
#pragma unroll
    for (int v = 0; v < VECS; v++)
#pragma unroll
      for (int i = 0; i < N; i++)
        if (owns(v)) got[v][i] = load_arriving(first + i * step + vector_offset(v));
        else got[v][i] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int v = 0; v < VECS; v++)
#pragma unroll
      for (int i = 0; i < N; i++) complete = complete && arrived(got[v][i]);
    if (complete) break;
    if (MANY) __nanosleep(NAP);
    if (++polls % POLLS_BETWEEN_CLOCKS) continue;
    if (start == 0) start = nanoseconds();
    if (nanoseconds() - start < a.timeout_ns) continue;
#pragma unroll
    for (int v = 0; v < VECS; v++)
#pragma unroll
      for (int i = 0; i < N; i++)
        if (!arrived(got[v][i])) give_up(a, source >= 0 ? source : rank_at(i, a.rank));
  }
#pragma unroll
  for (int v = 0; v < VECS; v++)
#pragma unroll
    for (int i = 0; i < N; i++)
      if (owns(v)) put_empty(first + i * step + vector_offset(v));
}

// Adds up in rank order, in fp32: the same bits on every rank and in both protocols.
DEVICE void sum_ranks(int rank, uint4 own, const uint4 (&others)[PEERS], float (&sum)[ELEMENTS]) {
#pragma unroll
  for (int r = 0; r < WORLD; r++) {
    // Registers have no run-time index: rank r is at place r or r - 1.
    uint4 v = own;
    if (r < rank) v = others[r < PEERS ? r : 0];
    if (r > rank) v = others[r > 0 ? r - 1 : 0];
    float f[ELEMENTS];
    unpack(v, f);
#pragma unroll
    for (int e = 0; e < ELEMENTS; e++) sum[e] = r == 0 ? f[e] : sum[e] + f[e];
  }
}

DEVICE u32 slot_of(const Args& a, int row) {
  u32 uses;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(uses) : "l"(a.uses + row) : "memory");
  return uses & 1;
}

// After a barrier that all threads pass once they have read the slot of `row`.
DEVICE void count_use(const Args& a, int row, u32 slot) {
  if (threadIdx.x == 0) a.uses[row] = slot + 1;  // its parity is what counts
}

// ---- one-shot: every rank sends its rows to every other, and adds up everything itself
//
// A buffer: [slot 2][place WORLD - 1][row capacity] rows of `pitch` bytes.

DEVICE u64 one_shot_row(const Args& a, u32 slot, int place, int row) {
  return a.pitch * (u64(slot * PEERS + place) * a.capacity + row);
}

template <int OP> DEVICE void one_shot(const Args& a) {
  __shared__ float scratch[2][32];
  int turn = 0;
  wait_for_previous_kernel();
  // All rows are on their way before the first is waited for.
  for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const u32 slot = slot_of(a, row);
#pragma unroll
    for (int v = 0; v < VECS; v++) {
      if (!owns(v)) continue;
      const uint4 mine = sendable(load_vector(a.x + row * a.x_stride, v));
#pragma unroll
      for (int k = 1; k < WORLD; k++) {
        const int to = neighbour(a.rank, k);
        send(a.buffers[to] + one_shot_row(a, slot, place_of(a.rank, to), row) + vector_offset(v), mine);
      }
    }
  }
  Gammas gammas;
  if (!LATE_GAMMA && OP == NORM_ADD_NORM) load_gamma(gammas.post, a.post_gamma);
  if (!LATE_GAMMA && OP != SUM) load_gamma(gammas.pre, a.pre_gamma);
  for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const u32 slot = slot_of(a, row);
    uint4 own[VECS], residual[VECS], others[VECS][PEERS];
    load_row(a.x + row * a.x_stride, own);
    load_row<OP != SUM>(a.residual + row * a.residual_stride, residual);
    receive<PEERS>(a, a.buffers[a.rank] + one_shot_row(a, slot, 0, row), a.pitch * a.capacity, -1, others);
    float sum[VECS][ELEMENTS];
#pragma unroll
    for (int v = 0; v < VECS; v++) sum_ranks(a.rank, own[v], others[v], sum[v]);
    if (OP == SUM) __syncthreads();
    finish<OP>(a, row, sum, residual, gammas, scratch, turn);
    count_use(a, row, slot);
  }
}

// ---- two-shot: row r is added up by rank r mod WORLD, which sends the rounded sum to the others
//
// Only the sum travels: every rank then runs the norms of all rows itself, from its own residual.
// Sending norm output and new residual instead would be twice the bytes.
// A buffer: [slot 2][place WORLD - 1][row capacity / WORLD], then [slot 2][row capacity] for sums.

DEVICE int owned_rows(const Args& a) { return (a.capacity + WORLD - 1) / WORLD; }

DEVICE u64 partial_row(const Args& a, u32 slot, int place, int row) {
  return a.pitch * (u64(slot * PEERS + place) * owned_rows(a) + row / WORLD);
}

DEVICE u64 sum_row(const Args& a, u32 slot, int row) {
  return a.pitch * (u64(2 * PEERS) * owned_rows(a) + u64(slot) * a.capacity + row);
}

DEVICE void send_partial(const Args& a, int row) {
  const int owner = row % WORLD;
  if (row >= a.rows || owner == a.rank) return;
  const u32 slot = slot_of(a, row);
  const u64 to = a.buffers[owner] + partial_row(a, slot, place_of(a.rank, owner), row);
#pragma unroll
  for (int v = 0; v < VECS; v++)
    if (owns(v)) send(to + vector_offset(v), sendable(load_vector(a.x + row * a.x_stride, v)));
}

// Block b has the rows b, b + gridDim.x, ... on every rank. Each turn, it sends its part of a row
// AHEAD turns on, adds up this turn's row if that is its to add up, and finishes the last turn's if
// that was another rank's: its sum has had a turn to arrive.
template <int OP> DEVICE void two_shot(const Args& a) {
  __shared__ float scratch[2][32];
  int turn = 0;
  wait_for_previous_kernel();
  const int step = gridDim.x;
#pragma unroll 1
  for (int k = 0; k < AHEAD; k++) send_partial(a, blockIdx.x + k * step);
  Gammas gammas;
  if (!LATE_GAMMA && OP == NORM_ADD_NORM) load_gamma(gammas.post, a.post_gamma);
  if (!LATE_GAMMA && OP != SUM) load_gamma(gammas.pre, a.pre_gamma);
#pragma unroll 1
  for (int row = blockIdx.x; row < a.rows + step; row += step) {
    send_partial(a, row + AHEAD * step);
    if (row < a.rows && row % WORLD == a.rank) {
      const u32 slot = slot_of(a, row);
      uint4 residual[VECS], others[VECS][PEERS], own[VECS];
      load_row<OP != SUM>(a.residual + row * a.residual_stride, residual);
      load_row(a.x + row * a.x_stride, own);
      receive<PEERS>(a, a.buffers[a.rank] + partial_row(a, slot, 0, row), a.pitch * owned_rows(a), -1, others);
      float sum[VECS][ELEMENTS];
#pragma unroll
      for (int v = 0; v < VECS; v++) {
        sum_ranks(a.rank, own[v], others[v], sum[v]);
        const uint4 rounded = sendable(pack(sum[v]));
#pragma unroll
        for (int k = 1; k < WORLD; k++) {
          const int to = neighbour(a.rank, k);
          if (owns(v)) send(a.buffers[to] + sum_row(a, slot, row) + vector_offset(v), rounded);
        }
      }
      if (OP == SUM) __syncthreads();
      finish<OP>(a, row, sum, residual, gammas, scratch, turn);
      count_use(a, row, slot);
    }
    const int last = row - step;
    if (last >= 0 && last % WORLD != a.rank) {
      const u32 slot = slot_of(a, last);
      uint4 residual[VECS], got[VECS][1];
      load_row<OP != SUM>(a.residual + last * a.residual_stride, residual);
      receive<1>(a, a.buffers[a.rank] + sum_row(a, slot, last), 0, last % WORLD, got);
      float sum[VECS][ELEMENTS];
#pragma unroll
      for (int v = 0; v < VECS; v++) unpack(got[v][0], sum[v]);
      if (OP == SUM) __syncthreads();
      finish<OP>(a, last, sum, residual, gammas, scratch, turn);
      count_use(a, last, slot);
    }
  }
}

#define KERNEL(name, body) \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const __grid_constant__ Args a) { body; }

#if FP8 == 0
KERNEL(sum_one_shot, one_shot<SUM>(a))
KERNEL(sum_two_shot, two_shot<SUM>(a))
#endif
KERNEL(add_norm_one_shot, one_shot<ADD_NORM>(a))
KERNEL(add_norm_two_shot, two_shot<ADD_NORM>(a))
KERNEL(norm_add_norm_one_shot, one_shot<NORM_ADD_NORM>(a))
KERNEL(norm_add_norm_two_shot, two_shot<NORM_ADD_NORM>(a))
