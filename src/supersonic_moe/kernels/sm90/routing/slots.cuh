// Where the slots of a token come from: its router logits, or the ids and weights that another router chose.
//
// A source is asked by a whole warp for one token. Lane j < top_k gets the local expert of choice j, `nowhere` if this rank has none, and
// its weight.
#pragma once
#include "routing/choose.cuh"
#include "routing/rows.cuh"

struct Placement {
    i32 offset;      // local expert e is expert offset + e of the model
    i32 num_experts;  // of the model: other ids are sentinels
    i32 routed;      // local experts, without a shared one
    i32 top_k;
    i32 choices;  // slots of a token: top_k, or one more where there is a shared expert

    DEVICE bool shared() const { return choices > top_k; }
    DEVICE u32 num_local() const { return routed + shared(); }
    DEVICE u16 local(i64 id) const { return id >= 0 && id < routed ? static_cast<u16>(id) : nowhere; }
};

template <u32 Values>
struct FromLogits {
    const float* logits;
    i64 row;  // elements from a token to the next
    const void* bias;
    RoutingRule rule;
    Placement placement;
    float* values;  // shared memory, 32 * Values floats for each warp

    DEVICE u16 operator()(i64 token, float& weight) const {
        const Choice choice = choose_experts<Values>(logits + token * row, bias, rule, values + threadIdx.x / 32 * 32 * Values);
        weight = choice.weight;
        return placement.local(static_cast<i64>(choice.expert) - placement.offset);
    }
};

struct FromIds {
    const void* ids;
    bool wide;             // 64-bit ids
    const float* weights;  // null: 1
    const i32* map;        // local expert of each expert of the model; null: the offset says
    float factor;
    Placement placement;

    DEVICE u16 operator()(i64 token, float& weight) const {
        const u32 lane = lane_index();
        if (lane >= placement.top_k) return nowhere;
        const i64 at = token * placement.top_k + lane;
        weight = (weights ? __ldg(weights + at) : 1.0f) * factor;
        const i64 id = wide ? __ldg(static_cast<const i64*>(ids) + at) : __ldg(static_cast<const i32*>(ids) + at);
        if (id < 0 || id >= placement.num_experts) return nowhere;
        return placement.local(map ? __ldg(map + id) : id - placement.offset);
    }
};

// All choices of a token: what the source says, then the shared expert with weight 1.
template <class Source>
DEVICE u16 slot_of_lane(const Source& source, i64 token, float& weight) {
    weight = 0.0f;
    const u16 expert = source(token, weight);
    if (lane_index() < source.placement.top_k) return expert;
    weight = 1.0f;
    return static_cast<u16>(source.placement.routed);
}
