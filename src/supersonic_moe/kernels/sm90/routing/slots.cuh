// Where the slots of a token come from: its router logits, or the ids and weights that another router chose.
//
// A whole warp asks a source for one token: first `load`, which only loads, then `choose`, where lane j < top_k gets the local expert of
// choice j, `nowhere` if this rank has none, and its weight. `choose` calls `meanwhile` when what was loaded has been used, so that the
// next token can be.
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
    DEVICE u16 local(u32 id) const { return id < static_cast<u32>(routed) ? static_cast<u16>(id) : nowhere; }
};

template <u32 Values>
struct FromLogits {
    struct Loaded {
        float logits[Values];
    };

    const float* logits;
    i64 row;  // elements from a token to the next
    const void* bias;
    RoutingRule rule;
    Placement placement;
    ChoiceShared<Values>* shared;  // of each warp
    float bias_of[Values];         // of this lane's experts

    DEVICE void load(u32 token, Loaded& loaded) const {
        load_experts(loaded.logits, logits + token * row, lane_index() * Values, rule.experts, minus_infinity());
    }
    // Once, behind the first `load`.
    DEVICE void prepare() { load_bias(bias_of, bias, rule.bias_type, lane_index() * Values, rule.experts); }

    template <class Meanwhile>
    DEVICE u16 choose(Loaded& loaded, float& weight, const Meanwhile& meanwhile) const {
        const Choice choice = choose_experts(loaded.logits, bias_of, rule, shared[threadIdx.x / 32], meanwhile);
        weight = choice.weight;
        return placement.local(choice.expert - placement.offset);
    }
};

struct FromIds {
    struct Loaded {
        i64 id;
        float weight;
    };

    const void* ids;
    bool wide;             // 64-bit ids
    const float* weights;  // null: 1
    const i32* map;        // local expert of each expert of the model; null: the offset says
    float factor;
    Placement placement;

    DEVICE void load(u32 token, Loaded& loaded) const {
        loaded = {-1, 0.0f};
        if (lane_index() >= placement.top_k) return;
        const i64 at = static_cast<i64>(token) * placement.top_k + lane_index();
        loaded.id = wide ? __ldg(static_cast<const i64*>(ids) + at) : __ldg(static_cast<const i32*>(ids) + at);
        loaded.weight = weights ? __ldg(weights + at) : 1.0f;
    }
    DEVICE void prepare() const {}

    template <class Meanwhile>
    DEVICE u16 choose(Loaded& loaded, float& weight, const Meanwhile& meanwhile) const {
        weight = loaded.weight * factor;
        const i64 id = loaded.id;
        meanwhile();
        if (id < 0 || id >= placement.num_experts) return nowhere;
        return placement.local(map ? __ldg(map + id) : static_cast<u32>(id) - placement.offset);
    }
};

// All choices of a token: what the source says, then the shared expert with weight 1; nowhere in the lanes behind.
template <class Source, class Meanwhile>
DEVICE u16 slot_of_lane(const Source& source, typename Source::Loaded& loaded, float& weight, const Meanwhile& meanwhile) {
    const Placement& placement = source.placement;
    const u32 lane = lane_index();
    const u16 expert = source.choose(loaded, weight, meanwhile);
    if (lane < placement.top_k) return expert;
    weight = 1.0f;
    return placement.shared() && lane == placement.top_k ? static_cast<u16>(placement.routed) : nowhere;
}
