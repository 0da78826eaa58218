// A custom operator for the tests, `tests.rowmill:Decay(x, rate) -> y`, y[i, j] = x[i, j] * exp(-rate * j).
//
// The wheels of ONNX Runtime bring no headers. Its binary interface is append-only, so the few functions used here are
// called by their place in the table of version 1 (`include/onnxruntime/core/session/onnxruntime_c_api.h` there).
#include <cmath>
#include <cstddef>
#include <cstdint>

typedef void* const* Table;
typedef void* Status;  // null: fine

struct Base {
  Table (*table)(uint32_t version);
  const char* (*version)();
};

enum { CREATE_DOMAIN = 26, ADD_TO_DOMAIN = 27, ADD_DOMAIN = 28, DATA = 51, RANK = 61, SIZES = 62, SHAPE_OF = 65, INPUT = 90, OUTPUT = 91, RELEASE_SHAPE = 99 };
enum { FLOAT = 1 };

struct Operator {
  uint32_t version;  // of the interface: 8 ends with the two functions at the end
  void* (*create)(const Operator*, Table, const void* info);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  int (*input_type)(const Operator*, size_t);
  size_t (*inputs)(const Operator*);
  int (*output_type)(const Operator*, size_t);
  size_t (*outputs)(const Operator*);
  void (*compute)(void*, void* context);
  void (*destroy)(void*);
  int (*input_kind)(const Operator*, size_t);
  int (*output_kind)(const Operator*, size_t);
};

template <typename... Arguments>
static Status call(Table table, int place, Arguments... arguments) {
  return reinterpret_cast<Status (*)(Arguments...)>(table[place])(arguments...);
}

static const float* input(Table table, void* context, size_t index, int64_t* sizes, size_t* rank) {
  const void* value = nullptr;
  call(table, INPUT, const_cast<const void*>(context), index, &value);
  void* shape = nullptr;
  call(table, SHAPE_OF, value, &shape);
  call(table, RANK, const_cast<const void*>(shape), rank);
  if (*rank <= 2) call(table, SIZES, const_cast<const void*>(shape), sizes, *rank);
  reinterpret_cast<void (*)(void*)>(table[RELEASE_SHAPE])(shape);
  void* data = nullptr;
  call(table, DATA, const_cast<void*>(value), &data);
  return static_cast<const float*>(data);
}

static void compute(void* kernel, void* context) {
  Table table = static_cast<Table>(kernel);
  int64_t sizes[2] = {1, 1}, one[2];
  size_t rank = 0, ignored = 0;
  const float* x = input(table, context, 0, sizes, &rank);
  const float rate = *input(table, context, 1, one, &ignored);
  void* value = nullptr;
  call(table, OUTPUT, context, size_t{0}, const_cast<const int64_t*>(sizes), rank, &value);
  void* data = nullptr;
  call(table, DATA, value, &data);
  float* y = static_cast<float*>(data);
  for (int64_t i = 0; i < sizes[0]; ++i)
    for (int64_t j = 0; j < sizes[1]; ++j) y[i * sizes[1] + j] = x[i * sizes[1] + j] * std::exp(-rate * static_cast<float>(j));
}

static const Operator decay = {
    8,
    [](const Operator*, Table table, const void*) -> void* { return const_cast<void**>(table); },
    [](const Operator*) -> const char* { return "Decay"; },
    [](const Operator*) -> const char* { return nullptr; },
    [](const Operator*, size_t) -> int { return FLOAT; },
    [](const Operator*) -> size_t { return 2; },
    [](const Operator*, size_t) -> int { return FLOAT; },
    [](const Operator*) -> size_t { return 1; },
    compute,
    [](void*) {},
    [](const Operator*, size_t) -> int { return 0; },
    [](const Operator*, size_t) -> int { return 0; },
};

extern "C" __attribute__((visibility("default"))) Status RegisterCustomOps(void* options, const Base* base) {
  Table table = base->table(8);
  void* domain = nullptr;
  if (Status failed = call(table, CREATE_DOMAIN, "tests.rowmill", &domain)) return failed;
  if (Status failed = call(table, ADD_TO_DOMAIN, domain, &decay)) return failed;
  return call(table, ADD_DOMAIN, options, domain);
}
