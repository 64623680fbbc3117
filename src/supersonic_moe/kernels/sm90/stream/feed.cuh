// Where items have so few rows that each block can quantize them itself: what weights are multiplied with goes from x, or from c in fp32, into
// the stages, by the warps that narrow tiles leave idle and the one that else loads tokens. Nothing is gathered, and between c and the product
// with W2 there is one release instead of two and an atomic, 2 to 3 us each while DRAM is busy (docs/log.md).
#pragma once
#include "stream/load.cuh"

constexpr u32 FEEDERS = 5;
constexpr u32 PASS_UNITS = 4;  // of a warp at a time; a unit is 128 elements of a row, in eight lanes

// The part of a feeding warp in a strip: every FEEDERS-th K block, of all rows.
struct Fed {
    const Problem& p;
    const Geometry& g;
    const Tile& strip;
    WeightScales scales;
    u32 feeder, before;  // K blocks of all strips before
    i32 slot;            // of row lane_index()

    struct Unit {
        u32 step, row, stage, phase;
        bool used;
    };
    struct Loaded {
        uint4 chunks[4];  // 16 elements: of e4m3 x the first, of bf16 x two, of c all
        float scale, upper, lower;
    };

    DEVICE u32 steps() const { return strip.count * scales.blocks; }
    DEVICE u32 own_steps() const { return (steps() + FEEDERS - 1 - feeder) / FEEDERS; }
    DEVICE u32 own_units() const { return own_steps() * strip.rows; }
    DEVICE u32 stage(u32 own_step) const { return (before + feeder + own_step * FEEDERS) % g.stages; }

    DEVICE Unit unit(u32 first) const {
        const u32 i = first + lane_index() / 8, own_step = i / strip.rows, step = feeder + own_step * FEEDERS;
        return {step, i % strip.rows, stage(own_step), (before + step) / g.stages % 2, i < own_units()};
    }

    // All lanes of a warp.
    DEVICE Loaded load(const Unit& unit) const {
        const u32 chunk = lane_index() % 8, k = unit.step % scales.blocks;
        const i32 slot_of_row = __shfl_sync(0xffffffffu, slot, unit.row);
        Loaded loaded = {};
        if (!unit.used) return loaded;
        if (chunk == 0 && unit.row == 0) {
            const u32 at = scales.at(strip, unit.step);
            loaded.upper = __ldg(scales.upper + at), loaded.lower = __ldg(scales.lower + at);
        }
        const u32 channel = k * LINE_BYTES + chunk * 16;
        if (strip.product == 2) {
            if (channel < static_cast<u32>(p.inter)) {
                const float4* const c = reinterpret_cast<const float4*>(p.c + static_cast<i64>(strip.row + unit.row) * p.inter + channel);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const float4 v = load_shared_by_blocks(c + i);
                    loaded.chunks[i] =
                        make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
                }
            }
            return loaded;
        }
        const i64 token = slot_of_row / p.choices;
        const bool routed = slot_of_row % p.choices < p.choices - p.shared();
        loaded.scale = p.x_weight && routed ? __ldg(p.x_weight + token) : 1.0f;
        if (p.of_tokens.x_bf16) {
            const u16* const at = reinterpret_cast<const u16*>(p.of_tokens.codes(2 * token)) + channel;
            loaded.chunks[0] = load_chunk(at), loaded.chunks[1] = load_chunk(at + 8);
        } else {
            loaded.chunks[0] = p.of_tokens.load(p.of_tokens.codes(token) + channel);
            loaded.scale *= p.of_tokens.scale(token, k);
        }
        return loaded;
    }

    // All lanes of a warp: into the stage, once it is free.
    DEVICE void store(const Block& block, const Unit& unit, const Loaded& loaded) const {
        const u32 chunk = lane_index() % 8;
        uint4 codes = loaded.chunks[0];
        float scale = loaded.scale;
        if (strip.product == 2) {
            float v[16];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const uint4 words = loaded.chunks[i];
                v[4 * i] = __uint_as_float(words.x), v[4 * i + 1] = __uint_as_float(words.y);
                v[4 * i + 2] = __uint_as_float(words.z), v[4 * i + 3] = __uint_as_float(words.w);
            }
            codes = quantize_chunk(v, p.pow2, scale);
        } else if (p.of_tokens.x_bf16) {
            float own;
            codes = quantize_chunk(loaded.chunks[0], loaded.chunks[1], p.pow2, own);
            scale *= own;
        }
        if (!unit.used) return;
        mbarrier_wait(block.empty(unit.stage), unit.phase ^ 1);
        u8* const rows = block.memory + unit.stage * g.stage_bytes + g.token_tile();
        *reinterpret_cast<uint4*>(rows + unit.row * LINE_BYTES + (chunk ^ unit.row % 8) * 16) = codes;
        if (chunk == 0) reinterpret_cast<float*>(block.memory + g.token_scales(unit.stage))[unit.row] = scale;
        if (chunk == 0 && unit.row == 0)
            block.side.weight_scales[unit.stage][0] = loaded.upper, block.side.weight_scales[unit.stage][1] = loaded.lower;
        fence_proxy_async();  // wgmma will read the row
    }
};

// One of the feeding warps.
DEVICE void feed_rows(const Block& block, const Problem& p, const Geometry& g, u32 feeder) {
    const u32 lane = lane_index();
    u32 seen = 0xffffffffu;  // item whose c is there
    u32 before = 0;
    Cursor queue;
    while (true) {
        const Tile strip = block.read_tile(queue);
        if (strip.product == 0) return;
        Fed fed = {p, g, strip, WeightScales(p, g, strip), feeder, before, 0};
        before += fed.steps();
        if (strip.product == 1) {
            fed.slot = lane < static_cast<u32>(strip.rows) ? p.row_slot[strip.row + lane] : 0;
            for (i32 row = 0; row < strip.rows; ++row) p.of_tokens.wait(__shfl_sync(0xffffffffu, fed.slot, row) / p.choices);
        } else if (strip.item != seen) {
            seen = strip.item;
            if (feeder == 0) wait_for_count(p.ready(seen), g.tiles1);
            named_barrier_sync(4, 32 * FEEDERS);
        }
        const u32 units = fed.own_units();
        u32 told = 0;
        Fed::Unit unit = fed.unit(0);
        Fed::Loaded loaded = fed.load(unit);
        for (u32 first = 0; first < units; first += PASS_UNITS) {
            const Fed::Unit next = fed.unit(first + PASS_UNITS);
            const Fed::Loaded ahead = fed.load(next);
            fed.store(block, unit, loaded);
            __syncwarp();
            for (const u32 done = min(first + PASS_UNITS, units) / strip.rows; told < done; ++told)
                if (lane == 0) mbarrier_arrive(block.tokens(fed.stage(told)));
            unit = next, loaded = ahead;
        }
    }
}
