// The experts and weights of one token, chosen by one warp: the rule of config/grouped_routing.py.
//
// Lane l holds the experts Values * l to Values * l + Values - 1 of the token. A score becomes an unsigned key of the same order; key 0
// stands for no candidate. The top_k-th largest of the lanes' largest keys bounds the chosen keys from below, and few others reach it:
// some 10 of DeepSeek-V3's 256. So each of them gets a lane and compares itself with all. Where more than 32 reach the bound, as where
// scores are equal, top_k rounds take the largest key of the warp each.
#pragma once
#include "ptx/scalar.cuh"

constexpr u32 all_lanes = 0xffffffffu;
constexpr float sum_epsilon = 1e-20f;  // config/router.py: SUM_EPS

enum Scoring : i32 { sigmoid = 0, softmax = 1, sqrt_softplus = 2 };
enum BiasType : i32 { no_bias = 0, bias_f32 = 1, bias_bf16 = 2 };

struct RoutingRule {
    i32 experts, top_k, groups, kept_groups, scoring, bias_type;
    i32 group_size;        // experts / groups
    i32 group_lanes_log2;  // of the lanes that hold a group, if they are a power of two and hold nothing else; else -1
    float factor;
};

struct Choice {
    u32 expert;    // in lane j < top_k: the j-th best
    float weight;  // of the same
};

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// Stands for no candidate: a NaN, which no maximum takes, and the one whose key is 0.
DEVICE float no_number() { return __uint_as_float(0xffffffffu); }

DEVICE float nan_lowest(float v) { return fmaxf(v, minus_infinity()); }

// Greater for greater v, at least 0x007fffff for numbers. v is not -0: no score is, and no sum of a score and a bias, or of two such, rounds to it.
DEVICE u32 order_key(float v) {
    const i32 bits = __float_as_int(v);
    return static_cast<u32>(bits ^ (bits >> 31 | static_cast<i32>(0x80000000)));
}

DEVICE float warp_max(float v) {
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(all_lanes, v, lanes));
    return v;
}

// Of the aligned group of Lanes lanes.
template <u32 Lanes = 32>
DEVICE float warp_sum(float v) {
#pragma unroll
    for (u32 lanes = Lanes / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(all_lanes, v, lanes);
    return v;
}

// `values[first + i]` for i < Values, `missing` past the last expert.
template <u32 Values>
DEVICE void load_experts(float (&v)[Values], const float* values, u32 first, u32 experts, float missing) {
    if (Values % 4 == 0 && first + Values <= experts && reinterpret_cast<u64>(values) % 16 == 0) {
#pragma unroll
        for (u32 i = 0; i < Values / 4; ++i) {
            const float4 four = __ldg(reinterpret_cast<const float4*>(values + first) + i);
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
        return;
    }
    const u16* const values = static_cast<const u16*>(bias);
    if (Values % 8 == 0 && type == bias_bf16 && first + Values <= experts && reinterpret_cast<u64>(values) % 16 == 0) {
#pragma unroll
        for (u32 i = 0; i < Values / 8; ++i) {
            const uint4 eight = __ldg(reinterpret_cast<const uint4*>(values + first) + i);
            const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (u32 j = 0; j < 4; ++j) v[8 * i + 2 * j] = bf16_low(pairs[j]), v[8 * i + 2 * j + 1] = bf16_high(pairs[j]);
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < Values; ++i)
        v[i] = type == bias_bf16 && first + i < experts ? __uint_as_float(static_cast<u32>(__ldg(values + first + i)) << 16) : 0.0f;
}

// 1 / v for 1 <= v < 2^126: the steps of the compiler's division, whose test of v costs as much as they do.
DEVICE float normal_reciprocal(float v) {
    const float r = reciprocal_approx(v);
    return fmaf(r, -fmaf(v, r, -1.0f), r);
}

template <u32 Values>
DEVICE void sigmoids(float (&x)[Values]) {
    u32 largest = 0;  // as bits: NaN is larger than all
#pragma unroll
    for (u32 i = 0; i < Values; ++i) {
        x[i] = 1.0f + expf(-x[i]);
        largest = max(largest, __float_as_uint(x[i]));
    }
    if (largest < 0x7e800000) {  // 2^126
#pragma unroll
        for (u32 i = 0; i < Values; ++i) x[i] = normal_reciprocal(x[i]);
    } else {
#pragma unroll
        for (u32 i = 0; i < Values; ++i) x[i] = 1.0f / x[i];
    }
}

// In place. Softmax divides by the sum over the token's experts.
template <u32 Values>
DEVICE void logits_to_scores(float (&x)[Values], i32 scoring) {
    if (scoring == sigmoid) {
        sigmoids(x);
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
    // With those of the other lanes of an aligned group of 2^log2 lanes.
    DEVICE void merge(u32 log2) {
        for (u32 lanes = 1u << log2 >> 1; lanes > 0; lanes /= 2) {
            const float other = __shfl_xor_sync(all_lanes, best, lanes), other_second = __shfl_xor_sync(all_lanes, second, lanes);
            second = fmaxf(fminf(best, other), fmaxf(second, other_second));
            best = fmaxf(best, other);
        }
    }
    // What a group of `size` experts is worth.
    DEVICE u32 key(i32 size) const { return order_key(nan_lowest(size == 1 ? best : best + second)); }
};

// Whether this lane's group, worth `mine`, is kept. Group g has the 2^log2 lanes from g << log2 on, each of which compares it with some others.
DEVICE bool group_is_kept(u32 mine, u32 log2, const RoutingRule& rule) {
    const u32 lane = lane_index(), groups = rule.groups, group = lane >> log2, width = 1u << log2;
    const u32 of_group = all_lanes >> (32 - width) << (group << log2);
    u32 better = 0;
    for (u32 g = lane & (width - 1); g - (lane & (width - 1)) < groups; g += width) {
        const u32 other = __shfl_sync(all_lanes, mine, g << log2);
        better += __popc(of_group & __ballot_sync(all_lanes, g < groups && (other > mine || (other == mine && g < group))));
    }
    return group < groups && better < static_cast<u32>(rule.kept_groups);
}

// Takes the numbers of dropped groups away. A group is worth the sum of its two largest, or its only one. `values`: this warp's shared
// memory, used where a lane's experts are not all of one group.
template <u32 Values>
DEVICE void keep_groups(float (&number)[Values], const RoutingRule& rule, float* values) {
    const u32 lane = lane_index(), groups = rule.groups, size = rule.group_size;
    TopTwo top;
    if (rule.group_lanes_log2 >= 0) {
#pragma unroll
        for (u32 i = 0; i < Values; ++i) top.add(number[i]);
        top.merge(rule.group_lanes_log2);
        const bool kept = group_is_kept(top.key(size), rule.group_lanes_log2, rule);
#pragma unroll
        for (u32 i = 0; i < Values; ++i) number[i] = kept ? number[i] : no_number();
        return;
    }
#pragma unroll
    for (u32 i = 0; i < Values; ++i) values[lane * Values + i] = number[i];
    __syncwarp();
    const u32 log2 = __clz(static_cast<i32>(groups - 1)) - 27;  // 32 lanes over the next power of two
    const u32 group = lane >> log2, width = 1u << log2;
    if (group < groups)
        for (u32 i = lane & (width - 1); i < size; i += width) top.add(values[group * size + i]);
    top.merge(log2);
    const u32 kept = __ballot_sync(all_lanes, group_is_kept(top.key(size), log2, rule));
    __syncwarp();
    const u32 inverse = (1u << 20) / size + 1;  // expert * inverse >> 20 is expert / size: exact below 1024 for size <= 512
#pragma unroll
    for (u32 i = 0; i < Values; ++i)
        if (!(kept >> (((lane * Values + i) * inverse >> 20) << log2) & 1)) number[i] = no_number();
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

template <class T>
struct alignas(16) Four {
    T x, y, z, w;
};

// What the lanes of a warp show one another of a token.
template <u32 Values>
struct alignas(16) ChoiceShared {
    float score[32 * Values];
    u32 key[32 * Values];
    u32 found[32];
};

// To `to`, aligned to 16 bytes where Values is 4 or more.
template <class T, u32 Values>
DEVICE void store_values(T* to, const T (&v)[Values]) {
    if constexpr (Values % 4 == 0) {
#pragma unroll
        for (u32 i = 0; i < Values; i += 4) {
            const Four<T> four = {v[i], v[i + 1], v[i + 2], v[i + 3]};
            *reinterpret_cast<Four<T>*>(to + i) = four;
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < Values; ++i) to[i] = v[i];
    }
}

// The top_k-th largest of what the lanes have, equal ones counted once; at least 1.
DEVICE u32 lower_bound(u32 mine, i32 top_k) {
    u32 bound = 0;
#pragma unroll 8
    for (i32 j = 0; j < top_k; ++j) {
        bound = __reduce_max_sync(all_lanes, mine);
        mine = mine == bound ? 0 : mine;
    }
    return max(bound, 1u);
}

// How many of the experts have a true `reached`; if they are 32 at most, they stand in `found` in order of index.
template <u32 Values>
DEVICE u32 collect(ChoiceShared<Values>& shared, const bool (&reached)[Values]) {
    const u32 lane = lane_index();
    u32 mine = 0;
#pragma unroll
    for (u32 i = 0; i < Values; ++i) mine |= reached[i] ? 1u << i : 0;
    const u32 own = __popc(mine);
    u32 upto = own;
#pragma unroll
    for (u32 lanes = 1; lanes < 32; lanes *= 2) {
        const u32 left = __shfl_up_sync(all_lanes, upto, lanes);
        if (lane >= lanes) upto += left;
    }
    const u32 count = __shfl_sync(all_lanes, upto, 31);
    if (count <= 32)
        for (u32 at = upto - own; mine != 0; mine &= mine - 1) shared.found[at++] = lane * Values + __ffs(mine) - 1;
    __syncwarp();
    return count;
}

// In lane j < top_k the j-th best of the `count` <= 32 experts in `found`.
template <u32 Values>
DEVICE u32 best_found(ChoiceShared<Values>& shared, u32 count, u32 top_k) {
    const u32 lane = lane_index();
    const u32 expert = lane < count ? shared.found[lane] : 0;
    const u32 own = lane < count ? shared.key[expert] : 0;
    __syncwarp();
    shared.found[lane] = own;
    __syncwarp();
    u32 rank = __popc(__match_any_sync(all_lanes, own) & ((1u << lane) - 1));  // equal ones stand in order of index
#pragma unroll 1
    for (u32 at = 0; at < count; at += 8) {
        const uint4 others = *reinterpret_cast<const uint4*>(&shared.found[at]), more = *reinterpret_cast<const uint4*>(&shared.found[at + 4]);
        count_if_greater(rank, others.x, own), count_if_greater(rank, others.y, own);
        count_if_greater(rank, others.z, own), count_if_greater(rank, others.w, own);
        count_if_greater(rank, more.x, own), count_if_greater(rank, more.y, own);
        count_if_greater(rank, more.z, own), count_if_greater(rank, more.w, own);
    }
    __syncwarp();
    if (rank < top_k) shared.found[rank] = expert;
    __syncwarp();
    return shared.found[lane];
}

// In lane j < top_k the expert of the j-th largest key.
template <u32 Values>
DEVICE u32 best_in_rounds(u32 (&key)[Values], i32 top_k) {
    const u32 lane = lane_index(), first = lane * Values;
    u32 chosen = 0;
    for (i32 j = 0; j < top_k; ++j) {
        u32 best, at;
        best_of<0, Values>(key, best, at);
        const u32 most = __reduce_max_sync(all_lanes, best);
        const u32 winner = __reduce_min_sync(all_lanes, best == most ? first + at : all_lanes);
        if (lane == j) chosen = winner;
#pragma unroll
        for (u32 i = 0; i < Values; ++i) key[i] = first + i == winner ? 0 : key[i];
    }
    return chosen;
}

// All lanes call it. `score`: this lane's logits, which become scores. `bias`: of the same experts. `meanwhile` is called when `score` has
// been used.
template <u32 Values, class Meanwhile>
DEVICE Choice choose_experts(float (&score)[Values], const float (&bias)[Values], const RoutingRule& rule, ChoiceShared<Values>& shared,
                             const Meanwhile& meanwhile) {
    const u32 lane = lane_index(), experts = rule.experts, first = lane * Values;
    logits_to_scores(score, rule.scoring);
    float number[Values];
#pragma unroll
    for (u32 i = 0; i < Values; ++i) number[i] = nan_lowest(score[i] + bias[i]);
    if (experts < 32 * Values) {
#pragma unroll
        for (u32 i = 0; i < Values; ++i) number[i] = first + i < experts ? number[i] : no_number();
    }
    if (rule.groups > 1) keep_groups(number, rule, shared.score);
    u32 key[Values], largest = 0;
#pragma unroll
    for (u32 i = 0; i < Values; ++i) {
        key[i] = order_key(number[i]);
        largest = max(largest, key[i]);
    }
    store_values(&shared.score[first], score);
    store_values(&shared.key[first], key);
    meanwhile();
    const u32 bound = lower_bound(largest, rule.top_k);
    bool reached[Values];
#pragma unroll
    for (u32 i = 0; i < Values; ++i) reached[i] = key[i] >= bound;
    const u32 count = collect(shared, reached);
    const u32 chosen = count <= 32 ? best_found(shared, count, rule.top_k) : best_in_rounds(key, rule.top_k);
    const float own = lane < rule.top_k ? shared.score[chosen] : 0.0f;
    const float sum = warp_sum<16>(own);  // top_k is 16 at most
    __syncwarp();  // the next token of this warp writes them again
    return {chosen, own / (sum + sum_epsilon) * rule.factor};
}
