// The experts and weights of one token, chosen by one warp: the rule of config/grouped_routing.py.
//
// Lane l holds the experts Values * l to Values * l + Values - 1 of the token. A score becomes an unsigned key of the same order, so that
// the warp finds the best expert by one maximum over keys and, among equals, one minimum over indices. Key 0 stands for no candidate.
// Everything is loaded before anything is computed: the kernel is as long as its chain of latencies.
#pragma once
#include "ptx/types.cuh"

constexpr u32 all_lanes = 0xffffffffu;
constexpr float sum_epsilon = 1e-20f;  // config/router.py: SUM_EPS

enum Scoring : i32 { sigmoid = 0, softmax = 1, sqrt_softplus = 2 };
enum BiasType : i32 { no_bias = 0, bias_f32 = 1, bias_bf16 = 2 };

struct RoutingRule {
    i32 experts, top_k, groups, kept_groups, scoring, bias_type;
    float factor;
};

struct Choice {
    u32 expert;    // in lane j < top_k: the j-th best
    float weight;  // of the same
};

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

DEVICE float nan_lowest(float v) { return v == v ? v : minus_infinity(); }

// Greater for greater v, at least 0x007fffff; -0 counts as +0.
DEVICE u32 order_key(float v) {
    const u32 bits = __float_as_uint(v + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The number whose key it is; NaN for key 0.
DEVICE float number_of_key(u32 key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }

DEVICE float warp_max(float v) {
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(all_lanes, v, lanes));
    return v;
}

DEVICE float warp_sum(float v) {
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(all_lanes, v, lanes);
    return v;
}

// `values[first + i]` for i < Values, `missing` past the last expert.
template <u32 Values>
DEVICE void load_experts(float (&v)[Values], const float* values, u32 first, u32 experts, float missing) {
    if (Values % 4 == 0 && experts % 4 == 0 && reinterpret_cast<u64>(values) % 16 == 0) {
#pragma unroll
        for (u32 i = 0; i < Values / 4; ++i) {
            const float4 four = first + 4 * i < experts ? __ldg(reinterpret_cast<const float4*>(values + first) + i)
                                                        : make_float4(missing, missing, missing, missing);
            v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < Values; ++i) v[i] = first + i < experts ? __ldg(values + first + i) : missing;
    }
}

template <u32 Values>
DEVICE void load_bias(float (&v)[Values], const void* bias, i32 type, u32 first, u32 experts) {
    if (type == bias_f32) {
        load_experts(v, static_cast<const float*>(bias), first, experts, 0.0f);
    } else {
        const u16* const values = static_cast<const u16*>(bias);
#pragma unroll
        for (u32 i = 0; i < Values; ++i)
            v[i] = type == bias_bf16 && first + i < experts ? __uint_as_float(static_cast<u32>(__ldg(values + first + i)) << 16) : 0.0f;
    }
}

// In place. Softmax divides by the sum over the token's experts.
template <u32 Values>
DEVICE void logits_to_scores(float (&x)[Values], i32 scoring) {
    if (scoring == sigmoid) {
#pragma unroll
        for (u32 i = 0; i < Values; ++i) x[i] = 1.0f / (1.0f + expf(-x[i]));
    } else if (scoring == softmax) {
        float top = x[0], total = 0.0f;
#pragma unroll
        for (u32 i = 1; i < Values; ++i) top = fmaxf(top, x[i]);
        top = warp_max(top);
#pragma unroll
        for (u32 i = 0; i < Values; ++i) x[i] = expf(x[i] - top), total += x[i];
        total = warp_sum(total);
#pragma unroll
        for (u32 i = 0; i < Values; ++i) x[i] = x[i] / total;
    } else {
#pragma unroll
        for (u32 i = 0; i < Values; ++i) x[i] = sqrtf(fmaxf(x[i], 0.0f) + log1pf(expf(-fabsf(x[i]))));
    }
}

// The two largest numbers seen.
struct TopTwo {
    float best = minus_infinity(), second = minus_infinity();
    DEVICE void add(float v) {
        second = fmaxf(second, fminf(best, v));
        best = fmaxf(best, v);
    }
    // With those of the other lanes of an aligned group of `width` lanes, a power of two.
    DEVICE void merge(u32 width) {
        for (u32 lanes = width / 2; lanes > 0; lanes /= 2) {
            const float other = __shfl_xor_sync(all_lanes, best, lanes), other_second = __shfl_xor_sync(all_lanes, second, lanes);
            second = fmaxf(fminf(best, other), fmaxf(second, other_second));
            best = fmaxf(best, other);
        }
    }
    // What a group of `size` experts is worth.
    DEVICE u32 key(u32 size) const { return order_key(nan_lowest(size == 1 ? best : best + second)); }
};

// Whether group `group`, worth `mine`, is kept; group g asks in lanes g * width and on.
DEVICE bool group_is_kept(u32 mine, u32 group, u32 width, const RoutingRule& rule) {
    u32 better = 0;
#pragma unroll 4
    for (u32 g = 0; g < static_cast<u32>(rule.groups); ++g) {
        const u32 other = __shfl_sync(all_lanes, mine, g * width);
        better += other > mine || (other == mine && g < group);
    }
    return group < static_cast<u32>(rule.groups) && better < static_cast<u32>(rule.kept_groups);
}

// Takes the candidates of dropped groups away. A group is worth the sum of its two largest numbers, or its only one. `values`: this warp's
// shared memory, used where a lane's experts are not all of one group.
template <u32 Values>
DEVICE void keep_groups(u32 (&key)[Values], const RoutingRule& rule, float* values) {
    const u32 lane = lane_index(), groups = rule.groups, size = static_cast<u32>(rule.experts) / groups, lanes = size / Values;
    if (size % Values == 0 && (lanes & (lanes - 1)) == 0) {
        TopTwo top;
#pragma unroll
        for (u32 i = 0; i < Values; ++i) top.add(number_of_key(key[i]));
        top.merge(lanes);
        const bool kept = group_is_kept(top.key(size), lane / lanes, lanes, rule);
#pragma unroll
        for (u32 i = 0; i < Values; ++i) key[i] = kept ? key[i] : 0;
        return;
    }
#pragma unroll
    for (u32 i = 0; i < Values; ++i) values[lane * Values + i] = number_of_key(key[i]);
    __syncwarp();
    const u32 width = 32u >> (32 - __clz(static_cast<i32>(groups - 1)));  // 32 lanes over the next power of two
    const u32 group = lane / width;
    TopTwo top;
    if (group < groups)
        for (u32 i = lane % width; i < size; i += width) top.add(values[group * size + i]);
    top.merge(width);
    const u32 kept = __ballot_sync(all_lanes, group_is_kept(top.key(size), group, width, rule));
    __syncwarp();
    const u32 inverse = (1u << 20) / size + 1;  // expert * inverse >> 20 is expert / size: exact below 1024 for size <= 512
#pragma unroll
    for (u32 i = 0; i < Values; ++i)
        if (!(kept >> ((lane * Values + i) * inverse >> 20) * width & 1)) key[i] = 0;
}

// The largest of the keys from Begin on, Count of them, and its place; the first among equals.
template <u32 Begin, u32 Count, u32 Values>
DEVICE void best_of(const u32 (&key)[Values], u32& best, u32& at) {
    if constexpr (Count == 1) {
        best = key[Begin], at = Begin;
    } else {
        u32 other, place;
        best_of<Begin, Count / 2>(key, best, at);
        best_of<Begin + Count / 2, Count / 2>(key, other, place);
        if (other > best) best = other, at = place;
    }
}

// All lanes call it. `values`: this warp's 32 * Values floats of shared memory, aligned to 16 bytes.
template <u32 Values>
DEVICE Choice choose_experts(const float* logits, const void* bias, const RoutingRule& rule, float* values) {
    const u32 lane = lane_index(), experts = rule.experts, first = lane * Values;
    float score[Values], bias_of[Values];
    load_experts(score, logits, first, experts, minus_infinity());
    load_bias(bias_of, bias, rule.bias_type, first, experts);
    logits_to_scores(score, rule.scoring);

    u32 key[Values];
#pragma unroll
    for (u32 i = 0; i < Values; ++i)
        key[i] = first + i < experts ? order_key(nan_lowest(score[i] + bias_of[i])) : 0;
    if (rule.groups > 1) keep_groups(key, rule, values);
#pragma unroll
    for (u32 i = 0; i < Values; ++i) values[first + i] = score[i];

    u32 chosen = 0;
    for (i32 j = 0; j < rule.top_k; ++j) {
        u32 best, at;
        best_of<0, Values>(key, best, at);
        const u32 most = __reduce_max_sync(all_lanes, best);
        const u32 winner = __reduce_min_sync(all_lanes, best == most ? first + at : all_lanes);
        if (lane == j) chosen = winner;
#pragma unroll
        for (u32 i = 0; i < Values; ++i) key[i] = first + i == winner ? 0 : key[i];
    }
    __syncwarp();
    const float own = lane < rule.top_k ? values[chosen] : 0.0f;
    const float sum = warp_sum(own);
    __syncwarp();  // the next token of this warp writes them again
    return {chosen, own / (sum + sum_epsilon) * rule.factor};
}
