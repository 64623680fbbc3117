// Warpgroup matrix multiply: d(64 x N, fp32, registers) = or += A(64 x K, shared) * B(K x N, shared), issued by 128 threads.
//
// One instruction consumes 32 bytes of K: K = 16 for bf16, K = 32 for e4m3. An operand is K-major when K is contiguous in
// shared memory, MN-major when M (of A) or N (of B) is; e4m3 takes K-major operands only.
//
// Accumulator fragment: thread t of the warpgroup holds, for row = 16 * (t / 32) + (t % 32) / 4 and column = 2 * (t % 4),
//   d[4 * j + 0], d[4 * j + 1] = D[row    ][8 * j + column], D[row    ][8 * j + column + 1]
//   d[4 * j + 2], d[4 * j + 3] = D[row + 8][8 * j + column], D[row + 8][8 * j + column + 1]      for j = 0 .. N / 8 - 1.
//
// Sequence: pin; fence; some multiplies; commit; wait; pin. Accumulators are read or written by other code only before it and
// after it. e4m3 products are summed with about 14 bits, so long sums over K are promoted to fp32 by the caller.
//
// Operand tiles have the layout that TMA writes with 128-byte swizzle, at addresses that are multiples of 1024:
//   K-major   one 128-byte line for each row of M or N, holding 64 bf16 or 128 e4m3 along K. Stepping K by one instruction
//             moves the descriptor by 32 bytes: the hardware applies the swizzle to the final address.
//   MN-major  (bf16) one 128-byte line for each k, holding 64 elements along M or N; a tile that is wider than 64 is a
//             sequence of such slabs, `slab_bytes` = 128 * (k in the tile) apart. Stepping K by 16 moves by 16 * 128 bytes.
#pragma once
#include "ptx/types.cuh"

// ---- shared-memory matrix descriptor ----
// bits 0..13 address / 16 | 16..29 leading offset / 16 | 32..45 stride offset / 16 | 49..51 base offset | 62..63 swizzle, 1: 128 B

DEVICE u64 matrix_descriptor(u32 address, u32 leading_bytes, u32 stride_bytes) {
    return static_cast<u64>(1) << 62 | static_cast<u64>(stride_bytes >> 4) << 32 | static_cast<u64>(leading_bytes >> 4) << 16 |
           static_cast<u64>((address & 0x3ffff) >> 4);
}

// Stride: from 8 lines (8 rows of M or N) to the next 8. The leading offset is not used in a swizzled K-major layout.
DEVICE u64 k_major_descriptor(u32 tile) { return matrix_descriptor(tile, 16, 1024); }

// Stride: from 8 lines (8 values of k) to the next 8. Leading offset: from 64 elements of M or N to the next 64.
DEVICE u64 mn_major_descriptor(u32 tile, u32 slab_bytes) { return matrix_descriptor(tile, slab_bytes, 1024); }

DEVICE u64 advance_descriptor(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

// ---- ordering ----

// Before the first multiply of a batch: registers and shared memory that it touches are settled.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most Pending committed groups of this warpgroup run.
template <u32 Pending>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving other uses of the accumulators across this point; costs no instruction.
template <int Count>
DEVICE void pin_accumulators(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- multiplies ----

enum class Major : int { K = 0, MN = 1 };

// WgmmaBf16<N, A, B>::multiply(d, descriptor_a, descriptor_b, accumulate): d = (accumulate ? d : 0) + A * B.
template <int Columns, Major MajorA = Major::K, Major MajorB = Major::K>
struct WgmmaBf16;

template <int Columns>
struct WgmmaE4m3;

// One asm statement names every accumulator, so each width has its own. REGS_k: "%0,%1, ..", OPERANDS_k: "+f"(d[0]), "+f"(d[1]), .., k of
// them, four more than the list before.
#define REGS_4 "%0,%1,%2,%3"
#define REGS_8 REGS_4 ",%4,%5,%6,%7"
#define REGS_12 REGS_8 ",%8,%9,%10,%11"
#define REGS_16 REGS_12 ",%12,%13,%14,%15"
#define REGS_20 REGS_16 ",%16,%17,%18,%19"
#define REGS_24 REGS_20 ",%20,%21,%22,%23"
#define REGS_28 REGS_24 ",%24,%25,%26,%27"
#define REGS_32 REGS_28 ",%28,%29,%30,%31"
#define REGS_36 REGS_32 ",%32,%33,%34,%35"
#define REGS_40 REGS_36 ",%36,%37,%38,%39"
#define REGS_44 REGS_40 ",%40,%41,%42,%43"
#define REGS_48 REGS_44 ",%44,%45,%46,%47"
#define REGS_52 REGS_48 ",%48,%49,%50,%51"
#define REGS_56 REGS_52 ",%52,%53,%54,%55"
#define REGS_60 REGS_56 ",%56,%57,%58,%59"
#define REGS_64 REGS_60 ",%60,%61,%62,%63"
#define REGS_68 REGS_64 ",%64,%65,%66,%67"
#define REGS_72 REGS_68 ",%68,%69,%70,%71"
#define REGS_76 REGS_72 ",%72,%73,%74,%75"
#define REGS_80 REGS_76 ",%76,%77,%78,%79"
#define REGS_84 REGS_80 ",%80,%81,%82,%83"
#define REGS_88 REGS_84 ",%84,%85,%86,%87"
#define REGS_92 REGS_88 ",%88,%89,%90,%91"
#define REGS_96 REGS_92 ",%92,%93,%94,%95"
#define REGS_100 REGS_96 ",%96,%97,%98,%99"
#define REGS_104 REGS_100 ",%100,%101,%102,%103"
#define REGS_108 REGS_104 ",%104,%105,%106,%107"
#define REGS_112 REGS_108 ",%108,%109,%110,%111"
#define REGS_116 REGS_112 ",%112,%113,%114,%115"
#define REGS_120 REGS_116 ",%116,%117,%118,%119"
#define REGS_124 REGS_120 ",%120,%121,%122,%123"
#define REGS_128 REGS_124 ",%124,%125,%126,%127"
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OPERANDS_4 FOUR(0)
#define OPERANDS_8 OPERANDS_4, FOUR(4)
#define OPERANDS_12 OPERANDS_8, FOUR(8)
#define OPERANDS_16 OPERANDS_12, FOUR(12)
#define OPERANDS_20 OPERANDS_16, FOUR(16)
#define OPERANDS_24 OPERANDS_20, FOUR(20)
#define OPERANDS_28 OPERANDS_24, FOUR(24)
#define OPERANDS_32 OPERANDS_28, FOUR(28)
#define OPERANDS_36 OPERANDS_32, FOUR(32)
#define OPERANDS_40 OPERANDS_36, FOUR(36)
#define OPERANDS_44 OPERANDS_40, FOUR(40)
#define OPERANDS_48 OPERANDS_44, FOUR(44)
#define OPERANDS_52 OPERANDS_48, FOUR(48)
#define OPERANDS_56 OPERANDS_52, FOUR(52)
#define OPERANDS_60 OPERANDS_56, FOUR(56)
#define OPERANDS_64 OPERANDS_60, FOUR(60)
#define OPERANDS_68 OPERANDS_64, FOUR(64)
#define OPERANDS_72 OPERANDS_68, FOUR(68)
#define OPERANDS_76 OPERANDS_72, FOUR(72)
#define OPERANDS_80 OPERANDS_76, FOUR(76)
#define OPERANDS_84 OPERANDS_80, FOUR(80)
#define OPERANDS_88 OPERANDS_84, FOUR(84)
#define OPERANDS_92 OPERANDS_88, FOUR(88)
#define OPERANDS_96 OPERANDS_92, FOUR(92)
#define OPERANDS_100 OPERANDS_96, FOUR(96)
#define OPERANDS_104 OPERANDS_100, FOUR(100)
#define OPERANDS_108 OPERANDS_104, FOUR(104)
#define OPERANDS_112 OPERANDS_108, FOUR(108)
#define OPERANDS_116 OPERANDS_112, FOUR(112)
#define OPERANDS_120 OPERANDS_116, FOUR(116)
#define OPERANDS_124 OPERANDS_120, FOUR(120)
#define OPERANDS_128 OPERANDS_124, FOUR(124)

// N: columns. COUNT = N / 2: accumulators of a thread. P0 .. P4: the operand numbers that follow them, COUNT + 0 .. 4.
#define DEFINE_WGMMA(N, COUNT, P0, P1, P2, P3, P4)                                                                     \
    template <Major MajorA, Major MajorB>                                                                              \
    struct WgmmaBf16<N, MajorA, MajorB> {                                                                              \
        DEVICE static void multiply(float (&d)[COUNT], u64 descriptor_a, u64 descriptor_b, bool accumulate) {          \
            asm volatile(                                                                                              \
                "{\n"                                                                                                  \
                ".reg .pred p;\n"                                                                                      \
                "setp.ne.b32 p, %" #P2 ", 0;\n"                                                                        \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS_##COUNT "}, %" #P0 ", %" #P1         \
                ", p, 1, 1, %" #P3 ", %" #P4 ";\n"                                                                     \
                "}\n"                                                                                                  \
                : OPERANDS_##COUNT                                                                                     \
                : "l"(descriptor_a), "l"(descriptor_b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(MajorA)),\
                  "n"(static_cast<int>(MajorB)));                                                                      \
        }                                                                                                              \
    };                                                                                                                 \
    template <>                                                                                                        \
    struct WgmmaE4m3<N> {                                                                                              \
        DEVICE static void multiply(float (&d)[COUNT], u64 descriptor_a, u64 descriptor_b, bool accumulate) {          \
            asm volatile(                                                                                              \
                "{\n"                                                                                                  \
                ".reg .pred p;\n"                                                                                      \
                "setp.ne.b32 p, %" #P2 ", 0;\n"                                                                        \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGS_##COUNT "}, %" #P0 ", %" #P1         \
                ", p, 1, 1;\n"                                                                                         \
                "}\n"                                                                                                  \
                : OPERANDS_##COUNT                                                                                     \
                : "l"(descriptor_a), "l"(descriptor_b), "r"(static_cast<int>(accumulate)));                            \
        }                                                                                                              \
    }

DEFINE_WGMMA(8, 4, 4, 5, 6, 7, 8);
DEFINE_WGMMA(16, 8, 8, 9, 10, 11, 12);
DEFINE_WGMMA(24, 12, 12, 13, 14, 15, 16);
DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20);
DEFINE_WGMMA(40, 20, 20, 21, 22, 23, 24);
DEFINE_WGMMA(48, 24, 24, 25, 26, 27, 28);
DEFINE_WGMMA(56, 28, 28, 29, 30, 31, 32);
DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36);
DEFINE_WGMMA(72, 36, 36, 37, 38, 39, 40);
DEFINE_WGMMA(80, 40, 40, 41, 42, 43, 44);
DEFINE_WGMMA(88, 44, 44, 45, 46, 47, 48);
DEFINE_WGMMA(96, 48, 48, 49, 50, 51, 52);
DEFINE_WGMMA(104, 52, 52, 53, 54, 55, 56);
DEFINE_WGMMA(112, 56, 56, 57, 58, 59, 60);
DEFINE_WGMMA(120, 60, 60, 61, 62, 63, 64);
DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68);
DEFINE_WGMMA(136, 68, 68, 69, 70, 71, 72);
DEFINE_WGMMA(144, 72, 72, 73, 74, 75, 76);
DEFINE_WGMMA(152, 76, 76, 77, 78, 79, 80);
DEFINE_WGMMA(160, 80, 80, 81, 82, 83, 84);
DEFINE_WGMMA(168, 84, 84, 85, 86, 87, 88);
DEFINE_WGMMA(176, 88, 88, 89, 90, 91, 92);
DEFINE_WGMMA(184, 92, 92, 93, 94, 95, 96);
DEFINE_WGMMA(192, 96, 96, 97, 98, 99, 100);
DEFINE_WGMMA(200, 100, 100, 101, 102, 103, 104);
DEFINE_WGMMA(208, 104, 104, 105, 106, 107, 108);
DEFINE_WGMMA(216, 108, 108, 109, 110, 111, 112);
DEFINE_WGMMA(224, 112, 112, 113, 114, 115, 116);
DEFINE_WGMMA(232, 116, 116, 117, 118, 119, 120);
DEFINE_WGMMA(240, 120, 120, 121, 122, 123, 124);
DEFINE_WGMMA(248, 124, 124, 125, 126, 127, 128);
DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132);

#undef DEFINE_WGMMA
#undef FOUR
