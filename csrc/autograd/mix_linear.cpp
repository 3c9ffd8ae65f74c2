// The mix_linear operators, over those of csrc/cpu and csrc/cuda: in C++ what mixout_fast/functional.py and autograd.py
// do in an eager call, from the checks of the operands to the autograd function. The stable ABI has no autograd, so
// this library works only with the torch version that it was built for; with any other, the functions in Python do the
// same at a greater cost to the host.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mixout_fast {
namespace {

using at::ScalarType, at::Tensor;
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

bool has_kernels(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// Whether the operands are ones that mix_linear in functional.py multiplies, if the weight is a matrix of a dtype that
// has kernels. Python says what is wrong with the others, and serves the few that are refused here for simplicity.
bool are_usual(const Tensor& input, const Tensor& weight, const MaybeTensor& target, const MaybeTensor& bias,
               bool autocast) {
  const auto is_dense = [&](const Tensor& tensor) {
    return tensor.layout() == at::kStrided && tensor.device() == weight.device() &&
           !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  const auto is_multiplied = [&](const Tensor& tensor) {
    return is_dense(tensor) &&
           (autocast ? has_kernels(tensor.scalar_type()) : tensor.scalar_type() == weight.scalar_type());
  };
  if (!is_dense(weight) || weight.numel() == 0) return false;
  if (!is_multiplied(input) || input.dim() == 0 || input.size(-1) != weight.size(1)) return false;
  if (bias && !(is_multiplied(*bias) && bias->dim() == 1 && bias->size(0) == weight.size(0))) return false;
  if (!target) return true;
  const bool fits = target->scalar_type() == weight.scalar_type() ||
                    (has_kernels(target->scalar_type()) && target->element_size() < weight.element_size());
  return is_dense(*target) && fits && target->sizes() == weight.sizes() && !target->requires_grad();
}

Tensor drawn_seed(const Tensor& weight) {
  using Limits = std::numeric_limits<int64_t>;
  return at::randint(Limits::min(), Limits::max(), {}, at::TensorOptions(weight.device()).dtype(at::kLong));
}

template <const char* library>
Tensor mix_linear(const Tensor& input, const Tensor& weight, const MaybeTensor& target, const MaybeTensor& bias,
                  const Tensor& seed, double p, bool per_column, double factor, bool gathers, bool one_pass,
                  bool one_pass_backward, bool tf32, bool full_product) {
  return MixLinear<library>::apply(
      input, weight, bias, target,
      Constants{seed, p, per_column, factor, gathers, one_pass, one_pass_backward, tf32, full_product});
}

// The checks, autocast's casts and the draw of a seed, then mix_linear. An undefined tensor, which is None in Python,
// where the operands are not the usual ones. `autocast` is the dtype that autocast asks for, one_pass_rows and
// one_pass_rows_backward are the most rows for which y and dX are computed in one pass.
template <const char* library>
Tensor checked_mix_linear(Tensor input, Tensor weight, const MaybeTensor& target, MaybeTensor bias,
                          const MaybeTensor& seed, const std::optional<ScalarType> autocast, double p, bool per_column,
                          double factor, bool gathers, int64_t one_pass_rows, int64_t one_pass_rows_backward, bool tf32,
                          bool full_product) {
  if (!are_usual(input, weight, target, bias, autocast.has_value())) return {};
  static const auto function = find<decltype(mix_linear<library>)>(library, "mix_linear");
  if (autocast) {
    input = input.to(*autocast);
    if (bias) bias = bias->to(*autocast);
    if (weight.scalar_type() != ScalarType::Float) weight = weight.to(*autocast); // the target follows the weight
  }
  if (bias) bias = bias->contiguous();
  const int64_t rows = input.numel() / weight.size(1);
  return function.call(input, weight, target, bias, seed ? *seed : drawn_seed(weight), p, per_column, factor, gathers,
                       rows <= one_pass_rows, rows <= one_pass_rows_backward, tf32, full_product);
}

constexpr const char* schema =
    "mix_linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor seed, float p, bool per_column,"
    " float factor, bool gathers, bool one_pass, bool one_pass_backward, bool tf32, bool full_product) -> Tensor";
constexpr const char* checked_schema =
    "checked_mix_linear(Tensor input, Tensor weight, Tensor? target, Tensor? bias, Tensor? seed, ScalarType? autocast,"
    " float p, bool per_column, float factor, bool gathers, int one_pass_rows, int one_pass_rows_backward, bool tf32,"
    " bool full_product) -> Tensor";

template <const char* library>
void define(torch::Library& m) {
  using c10::DispatchKey;
  m.def(schema, torch::dispatch(DispatchKey::CompositeImplicitAutograd, TORCH_FN(mix_linear<library>)));
  m.def(checked_schema, torch::dispatch(DispatchKey::CompositeImplicitAutograd, TORCH_FN(checked_mix_linear<library>)));
  // vmap, tracers and dispatch modes are to see the draw of the seed and what follows, not this function as a whole.
  for (const auto key : {DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::FuncTorchBatched,
                         DispatchKey::PreDispatch, DispatchKey::Python})
    m.impl("checked_mix_linear", torch::dispatch(key, torch::CppFunction::makeFallthrough()));
}

TORCH_LIBRARY_FRAGMENT(mixout_fast, m) { define<cpu>(m); }

TORCH_LIBRARY_FRAGMENT(mixout_fast_cuda, m) { define<cuda>(m); }

} // namespace
} // namespace mixout_fast
