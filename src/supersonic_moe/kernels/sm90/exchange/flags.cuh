// Flags of ranks whose GPUs reach each other's memory, and a wait for one of another rank that ends in any case. See exchange_flags.py.
//
// A flag is a word of 64 bits: an epoch, and below it what the exchange carries. Waits are those of a whole warp, a lane for each rank.
#pragma once
#include "ptx/memory.cuh"

constexpr u32 FLAGS = 32;                                         // of a kind, one for each rank
constexpr u32 FINISHED = 0, WRITTEN = FLAGS, STOP = 2 * FLAGS;        // words of a rank, written by the others
constexpr u32 WHY = 0, CALL = 1, PHASE = 2, PEER = 3, WANTED = 4, SEEN = 5, TOLD = 6, WAITS_IN = 7;  // words of the host
constexpr u64 LATE = 1, STOPPED = 2, OTHER_CALL = 3;              // why a wait has failed
constexpr u32 TRIES = 256;                                        // between two looks at the host's memory, which take a microsecond

struct Wait {
    u64** words;  // of each rank
    i32 rank, ranks;
    i64 limit_ns;
    i32 call, phase;
    u64* host;
};

DEVICE u64 epoch_of(u64 flag) { return flag >> 32; }

// For the host, who looks now and then, in which call this rank waits; 0 if it does not. Nothing is published with it.
DEVICE void say_waiting(const Wait& wait, u64 call) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(wait.host + WAITS_IN), "l"(call) : "memory");
}

// Until the flag is of this epoch, or of a later one: 0, or why not. `seen` is the last that was read; who told to stop, if STOPPED.
DEVICE u64 wait_for(const Wait& wait, u32 flag, u64 epoch, u64& seen) {
    const u64* mine = wait.words[wait.rank];
    const u64 start = wall_clock();
    for (u32 tries = 1;; ++tries) {
        seen = load_acquire_system(mine + flag);
        if (epoch_of(seen) >= epoch) {
            if (tries > TRIES) say_waiting(wait, 0);
            return 0;
        }
        u64 told = load_acquire_system(mine + STOP);
        if (told == 0 && tries % TRIES == 0) {
            say_waiting(wait, wait.call);
            told = load_acquire_system(wait.host + TOLD);
        }
        if (told != 0) {
            seen = told;
            return STOPPED;
        }
        if (wall_clock() - start > static_cast<u64>(wait.limit_ns)) return LATE;
        __nanosleep(40);
    }
}

// All lanes together. If the wait of one has failed: tell the host and the other ranks, and stop.
DEVICE void settle(const Wait& wait, u64 why, u64 wanted, u64 seen) {
    const u32 failed = __ballot_sync(0xffffffffu, why != 0);
    if (failed == 0) return;
    const u32 first = __ffs(failed) - 1, lane = lane_index();
    const u64 reason = __shfl_sync(0xffffffffu, why, first);
    if (lane == first) {
        wait.host[CALL] = wait.call;
        wait.host[PHASE] = wait.phase;
        wait.host[PEER] = why == STOPPED ? seen - 1 : lane;
        wait.host[WANTED] = why == OTHER_CALL ? wanted : epoch_of(wanted);
        wait.host[SEEN] = why == OTHER_CALL ? seen : epoch_of(seen);
        store_release_system(wait.host + WHY, why);
    }
    if (reason != STOPPED && lane < wait.ranks && lane != wait.rank) store_release_system(wait.words[lane] + STOP, wait.rank + 1);
    __threadfence_system();
    __syncwarp();
    trap();
}

// A warp, until the ranks of `lanes` have written what belongs to this epoch; this rank itself is not asked.
DEVICE void wait_for_written(const Wait& wait, u32 lanes, u64 epoch) {
    const u32 lane = lane_index();
    u64 why = 0, seen = 0;
    if ((lanes >> lane & 1) && lane != wait.rank) why = wait_for(wait, WRITTEN + lane, epoch, seen);
    settle(wait, why, epoch << 32, seen);
    __syncwarp();  // what one lane has seen, all have
}

DEVICE u32 lanes_of_ranks(i32 ranks) { return 0xffffffffu >> (32 - ranks); }

// One thread, behind what this rank has written for the epoch: all others may read it.
DEVICE void tell_written(const Wait& wait, u64 epoch) {
    for (i32 peer = 0; peer < wait.ranks; ++peer)
        if (peer != wait.rank) store_release_system(wait.words[peer] + WRITTEN + wait.rank, epoch << 32);
}
