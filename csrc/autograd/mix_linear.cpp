// The mix_linear operators, over those of csrc/cpu and csrc/cuda: the autograd function of mixout_fast/autograd.py in
// C++, for eager calls. The stable ABI has no autograd, so this library works only with the torch version that it was
// built for; with any other, the function in Python does the same at a greater cost to the host.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
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

// The signatures of the schemas in csrc/library.h.
using Linear = std::tuple<Tensor, MaybeTensor, MaybeTensor>(const Tensor&, const Tensor&, const MaybeTensor&,
                                                            const MaybeTensor&, const Tensor&, double, bool, bool, bool,
                                                            bool, bool);
using LinearBackward = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor>(const Tensor&, const MaybeTensor&,
                                                                         const MaybeTensor&, const MaybeTensor&,
                                                                         const Tensor&, const MaybeTensor&,
                                                                         const Tensor&, bool, bool, bool, double, bool,
                                                                         double, bool, bool, bool);

// The message of mixout_fast/autograd.py, which says why the error is raised in backward and not later.
constexpr const char* differentiates_once =
    "mix_linear differentiates once, and its gradients are to be differentiated (create_graph=True): "
    "compute F.linear(input, mixout(weight, ...), bias), which differentiates twice";

constexpr char cpu[] = "mixout_fast", cuda[] = "mixout_fast_cuda";

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* library, const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string(library) + "::" + name).c_str(), "")
      .typed<Signature>();
}

MaybeTensor maybe(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }

Tensor or_undefined(const MaybeTensor& tensor) { return tensor ? *tensor : Tensor(); }

struct Constants {
  const Tensor& seed;
  double p;
  bool per_column;
  double factor;
  bool gathers, one_pass, one_pass_backward, tf32, full_product;
};

template <const char* library>
struct MixLinear : torch::autograd::Function<MixLinear<library>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& held_target, const Constants& call) {
    static const auto linear = find<Linear>(library, "linear");
    // The target may be held in a smaller dtype, and is saved as it is held.
    const MaybeTensor target = held_target ? MaybeTensor(held_target->to(weight.scalar_type())) : std::nullopt;
    const auto [output, index, columns] = linear.call(input, weight, target, bias, call.seed, call.p, call.per_column,
                                                      call.one_pass, call.tf32, call.gathers, false);
    ctx->save_for_backward({weight, or_undefined(held_target), call.seed, or_undefined(index), or_undefined(columns),
                            weight.requires_grad() && !call.gathers ? input : Tensor()});
    ctx->saved_data["constants"] = c10::ivalue::Tuple::create(
        call.p, call.factor, call.per_column, call.one_pass_backward, call.tf32, call.full_product, bias.has_value());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(), differentiates_once);
    static const auto linear_backward = find<LinearBackward>(library, "linear_backward");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &weight = saved[0], &target = saved[1], &seed = saved[2], &index = saved[3], &columns = saved[4],
                 &input = saved[5];
    const std::vector<c10::IValue> values = ctx->saved_data["constants"].toTupleRef().elements().vec();
    const double p = values[0].toDouble(), factor = values[1].toDouble();
    const bool per_column = values[2].toBool(), one_pass = values[3].toBool(), tf32 = values[4].toBool(),
               full_product = values[5].toBool(), has_bias = values[6].toBool();
    const bool needs_input = ctx->needs_input_grad(0), needs_weight = ctx->needs_input_grad(1);
    const bool needs_bias = has_bias && ctx->needs_input_grad(2);
    const MaybeTensor wide =
        needs_input && target.defined() ? MaybeTensor(target.to(weight.scalar_type())) : std::nullopt;
    const auto [grad_input, grad_weight, grad_bias] =
        linear_backward.call(gradients[0], maybe(input), maybe(index), maybe(columns), weight, wide, seed, needs_input,
                             needs_weight, needs_bias, p, per_column, factor, one_pass, tf32, full_product);
    variable_list results{or_undefined(grad_input), or_undefined(grad_weight), or_undefined(grad_bias)};
    results.resize(5); // none for the target and the constants
    return results;
  }
};

template <const char* library>
Tensor mix_linear(const Tensor& input, const Tensor& weight, const MaybeTensor& target, const MaybeTensor& bias,
                  const Tensor& seed, double p, bool per_column, double factor, bool gathers, bool one_pass,
                  bool one_pass_backward, bool tf32, bool full_product) {
  return MixLinear<library>::apply(
      input, weight, bias, target,
      Constants{seed, p, per_column, factor, gathers, one_pass, one_pass_backward, tf32, full_product});
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
