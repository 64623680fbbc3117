// Flags of ranks whose GPUs reach each other's memory: who may be written to, and whose rows are there. See exchange_flags.py.
//
// One warp, a lane for each rank.
#include "exchange/flags.cuh"

// A new exchange, through the bank whose last one was of epoch state[1 + bank]: this rank has read what came before; wait until all
// others have read what went through the bank.
extern "C" __global__ void __launch_bounds__(32, 1)
    exchange_begin(u64** words, const i32 rank, const i32 ranks, const i64 limit_ns, const i32 call, const i32 phase, u64* host,
                   u64* state, const i32 bank) {
    const Wait wait{words, rank, ranks, limit_ns, call, phase, host};
    const u32 lane = lane_index();
    const u64 before = state[0], last = state[1 + bank];
    u64 why = 0, seen = 0;
    if (lane < ranks && lane != rank) {
        store_release_system(words[lane] + FINISHED + rank, before << 32);
        why = wait_for(wait, FINISHED + lane, last, seen);
    }
    settle(wait, why, last << 32, seen);
    if (lane == 0) state[0] = state[1 + bank] = before + 1;
}

// The rows of this rank are where they are read: say so, and wait for those of all others. `kind` is the same on all ranks.
extern "C" __global__ void __launch_bounds__(32, 1)
    exchange_meet(u64** words, const i32 rank, const i32 ranks, const i64 limit_ns, const i32 call, const i32 phase, u64* host,
                  const u64* state, const u32 kind) {
    const Wait wait{words, rank, ranks, limit_ns, call, phase, host};
    const u32 lane = lane_index();
    const u64 epoch = state[0], flag = epoch << 32 | kind;
    u64 why = 0, seen = flag;
    if (lane < ranks && lane != rank) {
        store_release_system(words[lane] + WRITTEN + rank, flag);
        why = wait_for(wait, WRITTEN + lane, epoch, seen);
        if (why == 0 && epoch_of(seen) == epoch && seen != flag) why = OTHER_CALL;
    }
    settle(wait, why, flag, seen);
}
