// The experts and weights of one token, chosen by one warp: the rule of config/grouped_routing.py.
//
// Lane l holds the experts l, l + 32, l + 64, ... of the token: Values of them. A score becomes an unsigned key of the same order, so that
// the warp finds the best expert by one maximum over keys and, among equals, one minimum over indices. Key 0 stands for no candidate.
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

// `top` and `total` belong to softmax: the largest logit of the token, and the sum of exp(logit - top).
DEVICE float routing_score(float x, i32 scoring, float top, float total) {
    if (scoring == sigmoid) return 1.0f / (1.0f + expf(-x));
    if (scoring == softmax) return expf(x - top) / total;
    return sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
}

DEVICE float routing_bias(const void* bias, i32 type, u32 expert) {
    if (type == bias_f32) return __ldg(static_cast<const float*>(bias) + expert);
    return __uint_as_float(static_cast<u32>(__ldg(static_cast<const u16*>(bias) + expert)) << 16);
}

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

DEVICE float nan_lowest(float v) { return v == v ? v : minus_infinity(); }

// Greater for greater v, at least 0x007fffff; -0 counts as +0.
DEVICE u32 order_key(float v) {
    const u32 bits = __float_as_uint(v + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

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

// Bit g * `width` is set for each kept group g, width = lanes of a group. `values`: this warp's shared memory, one float an expert.
// A group is worth the sum of its two largest values, or its only one.
DEVICE u32 kept_groups(const float* values, const RoutingRule& rule, u32 width) {
    const u32 lane = lane_index(), group = lane / width, size = rule.experts / rule.groups;
    const bool used = group < static_cast<u32>(rule.groups);
    float best = minus_infinity(), second = minus_infinity();
    if (used) {
        for (u32 i = lane % width; i < size; i += width) {
            const float v = values[group * size + i];
            second = fmaxf(second, fminf(best, v));
            best = fmaxf(best, v);
        }
    }
    for (u32 lanes = width / 2; lanes > 0; lanes /= 2) {
        const float other = __shfl_xor_sync(all_lanes, best, lanes), other_second = __shfl_xor_sync(all_lanes, second, lanes);
        second = fmaxf(fminf(best, other), fmaxf(second, other_second));
        best = fmaxf(best, other);
    }
    const u32 mine = order_key(nan_lowest(size == 1 ? best : best + second));
    u32 better = 0;
    for (u32 g = 0; g < static_cast<u32>(rule.groups); ++g) {
        const u32 other = __shfl_sync(all_lanes, mine, g * width);
        better += other > mine || (other == mine && g < group);
    }
    return __ballot_sync(all_lanes, used && lane % width == 0 && better < static_cast<u32>(rule.kept_groups));
}

// All lanes call it. `values`: this warp's 32 * Values floats of shared memory, used where there are groups.
template <u32 Values>
DEVICE Choice choose_experts(const float* logits, const void* bias, const RoutingRule& rule, float* values) {
    const u32 lane = lane_index(), experts = rule.experts;
    float x[Values];
#pragma unroll
    for (u32 i = 0; i < Values; ++i) x[i] = lane + 32 * i < experts ? __ldg(logits + lane + 32 * i) : minus_infinity();

    float top = 0.0f, total = 1.0f;
    if (rule.scoring == softmax) {
        top = x[0];
#pragma unroll
        for (u32 i = 1; i < Values; ++i) top = fmaxf(top, x[i]);
        top = warp_max(top);
        total = 0.0f;
#pragma unroll
        for (u32 i = 0; i < Values; ++i) total += lane + 32 * i < experts ? expf(x[i] - top) : 0.0f;
        total = warp_sum(total);
    }

    u32 key[Values];
#pragma unroll
    for (u32 i = 0; i < Values; ++i) {
        const u32 expert = lane + 32 * i;
        key[i] = 0;
        if (expert < experts) {
            float v = routing_score(x[i], rule.scoring, top, total);
            if (rule.bias_type != no_bias) v += routing_bias(bias, rule.bias_type, expert);
            v = nan_lowest(v);
            key[i] = order_key(v);
            if (rule.groups > 1) values[expert] = v;
        }
    }

    if (rule.groups > 1) {
        __syncwarp();
        const u32 groups = rule.groups, size = experts / groups;
        const u32 width = 32u >> (32 - __clz(static_cast<i32>(groups - 1)));  // 32 lanes over the next power of two
        const u32 kept = kept_groups(values, rule, width);
        __syncwarp();
        const u32 inverse = (1u << 20) / size + 1;  // expert * inverse >> 20 is expert / size: exact below 1024 for size <= 512
#pragma unroll
        for (u32 i = 0; i < Values; ++i)
            if (!(kept >> ((lane + 32 * i) * inverse >> 20) * width & 1)) key[i] = 0;
    }

    u32 chosen = 0;
    for (i32 j = 0; j < rule.top_k; ++j) {
        u32 best = 0, at = all_lanes;
#pragma unroll
        for (u32 i = 0; i < Values; ++i) {
            if (key[i] > best) best = key[i], at = lane + 32 * i;
        }
        const u32 most = __reduce_max_sync(all_lanes, best);
        const u32 winner = __reduce_min_sync(all_lanes, best == most ? at : all_lanes);
        if (lane == j) chosen = winner;
#pragma unroll
        for (u32 i = 0; i < Values; ++i)
            if (lane + 32 * i == winner) key[i] = 0;
    }

    const bool holds = lane < rule.top_k;
    const float score = holds ? routing_score(__ldg(logits + chosen), rule.scoring, top, total) : 0.0f;
    return {chosen, score / (warp_sum(score) + sum_epsilon) * rule.factor};
}
