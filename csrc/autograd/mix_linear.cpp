// mix_linear of the operators of csrc/cpu and csrc/cuda: the autograd function of mixout_fast/autograd.py for eager
// calls, in C++. The stable ABI has no autograd, so this library serves the one torch that it was built for; beside any
// other the function in Python does the same at a greater cost to the host.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mixout_fast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;

// As csrc/library.h has them.
using Linear = std::tuple<Tensor, MaybeTensor, MaybeTensor>(const Tensor&, const Tensor&, const MaybeTensor&,
                                                            const MaybeTensor&, const Tensor&, double, bool, bool, bool,
                                                            bool, bool);
using LinearBackward = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor>(const Tensor&, const MaybeTensor&,
                                                                         const MaybeTensor&, const MaybeTensor&,
                                                                         const Tensor&, const MaybeTensor&,
                                                                         const Tensor&, bool, bool, bool, double, bool,
                                                                         double, bool, bool, bool);

constexpr char cpu[] = "mixout_fast", cuda[] = "mixout_fast_cuda";

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* library, const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string(library) + "::" + name).c_str(), "")
      .typed<Signature>();
}

MaybeTensor maybe(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }

Tensor or_undefined(const MaybeTensor& tensor) { return tensor ? *tensor : Tensor(); }

// A call's arguments beside the input, the weight and the bias: none of them gets a gradient.
struct Constants {
  const MaybeTensor& target;
  const Tensor& seed;
  double p;
  bool per_column;
  double factor;
  bool gathers, one_pass, one_pass_backward, tf32, full_product, trains_weight;
};

// Gradients that raise when they are differentiated.
variable_list refusing(variable_list gradients) {
  for (Tensor& gradient : gradients)
    if (gradient.defined()) gradient = gradient.detach().requires_grad_();
  torch::autograd::DelayedError error("trying to differentiate twice what mix_linear differentiates once",
                                      static_cast<int64_t>(gradients.size()));
  const at::AutoGradMode with_grad(true);
  return error.apply(std::move(gradients));
}

template <const char* library>
struct MixLinear : torch::autograd::Function<MixLinear<library>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                        const Constants& call) {
    static const auto linear = find<Linear>(library, "linear");
    // A target may be held, and is saved, in a smaller dtype.
    const MaybeTensor target = call.target ? MaybeTensor(call.target->to(weight.scalar_type())) : std::nullopt;
    const bool gathers = call.gathers && call.trains_weight;
    const auto [output, index, columns] = linear.call(input, weight, target, bias, call.seed, call.p, call.per_column,
                                                      call.one_pass, call.tf32, gathers, false);
    ctx->save_for_backward({weight, or_undefined(call.target), call.seed, or_undefined(index), or_undefined(columns),
                            call.trains_weight && !gathers ? input : Tensor()});
    ctx->saved_data["constants"] = c10::ivalue::Tuple::create(
        call.p, call.per_column, call.factor, call.one_pass_backward, call.tf32, call.full_product, bias.has_value());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    static const auto linear_backward = find<LinearBackward>(library, "linear_backward");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &weight = saved[0], &target = saved[1], &seed = saved[2], &index = saved[3], &columns = saved[4],
                 &input = saved[5];
    const std::vector<c10::IValue> values = ctx->saved_data["constants"].toTupleRef().elements().vec();
    const bool needs_input = ctx->needs_input_grad(0), needs_weight = ctx->needs_input_grad(1);
    const bool needs_bias = values[6].toBool() && ctx->needs_input_grad(2);
    const MaybeTensor wide =
        needs_input && target.defined() ? MaybeTensor(target.to(weight.scalar_type())) : std::nullopt;
    const bool differentiates_twice = at::GradMode::is_enabled() && gradients[0].requires_grad();
    const at::NoGradGuard no_grad;
    const auto [grad_input, grad_weight, grad_bias] =
        linear_backward.call(gradients[0], maybe(input), maybe(index), maybe(columns), weight, wide, seed, needs_input,
                             needs_weight, needs_bias, values[0].toDouble(), values[1].toBool(), values[2].toDouble(),
                             values[3].toBool(), values[4].toBool(), values[5].toBool());
    variable_list results{or_undefined(grad_input), or_undefined(grad_weight), or_undefined(grad_bias)};
    if (differentiates_twice) results = refusing(std::move(results));
    results.emplace_back(); // of the constants
    return results;
  }
};

template <const char* library>
Tensor mix_linear(const Tensor& input, const Tensor& weight, const MaybeTensor& target, const MaybeTensor& bias,
                  const Tensor& seed, double p, bool per_column, double factor, bool gathers, bool one_pass,
                  bool one_pass_backward, bool tf32, bool full_product) {
  const bool trains_weight = at::GradMode::is_enabled() && weight.requires_grad();
  return MixLinear<library>::apply(input, weight, bias,
                                   Constants{target, seed, p, per_column, factor, gathers, one_pass, one_pass_backward,
                                             tf32, full_product, trains_weight});
}

constexpr const char* schema =
    "mix_linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor seed, float p, bool per_column,"
    " float factor, bool gathers, bool one_pass, bool one_pass_backward, bool tf32, bool full_product) -> Tensor";

TORCH_LIBRARY_FRAGMENT(mixout_fast, m) {
  m.def(schema, torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(mix_linear<cpu>)));
}

TORCH_LIBRARY_FRAGMENT(mixout_fast_cuda, m) {
  m.def(schema, torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(mix_linear<cuda>)));
}

} // namespace
} // namespace mixout_fast
