// Every error that clip_export throws on purpose, the same tree as in Python (clip_export/errors.py).
//
//     Error
//     ├── BundleError            the bundle cannot be read
//     │   ├── BundleNotFoundError    no bundle at this path
//     │   ├── BundleSchemaError      the manifest is malformed, or of a newer schema
//     │   └── BundleIntegrityError   a file is changed, missing, truncated or outside the directory
//     ├── InputError             what the user handed in cannot be encoded
//     │   ├── TextError              no UTF-8, too long, not encodable
//     │   └── ImageError             of no pixels, of too many, of an unknown number of channels
//     ├── BackendError           an engine cannot be opened or has failed
//     │   ├── NoPlanError            no plan of the bundle fits this machine
//     │   └── DeviceError            no GPU, no driver, or not enough of its memory
//     ├── MissingDependencyError a backend is needed that is not compiled in, or not installed
//     └── SpecError              a spec or a tokenizer has an unknown key, lacks one, or holds an impossible value
//
// what() is the message, and the hint on a line of its own where there is one, as str(error) in Python.
#pragma once

#include <stdexcept>
#include <string>

namespace clip_export {

// The codes of the C ABI. 0 is success, 1 anything that was not thrown on purpose.
enum class ErrorCode : int {
    bundle = 10,
    bundle_not_found = 11,
    bundle_schema = 12,
    bundle_integrity = 13,
    input = 20,
    text = 21,
    image = 22,
    backend = 30,
    no_plan = 31,
    device = 32,
    missing_dependency = 40,
    spec = 50,
};

// Base of all: message() says what was expected and found, hint() what to do next ("" where there is nothing to say).
class Error : public std::runtime_error {
  public:
    Error(ErrorCode code, const std::string &message, const std::string &hint)
        : std::runtime_error(hint.empty() ? message : message + "\nhint: " + hint), code_(code), message_(message),
          hint_(hint) {}

    ErrorCode code() const { return code_; }
    const std::string &message() const { return message_; }
    const std::string &hint() const { return hint_; }

  private:
    ErrorCode code_;
    std::string message_, hint_;
};

// One error class: its name, its base, and the code that it has unless a class derived from it says otherwise.
#define CLIP_EXPORT_ERROR(NAME, BASE, CODE)                                                                            \
    class NAME : public BASE {                                                                                         \
      public:                                                                                                          \
        explicit NAME(const std::string &message, const std::string &hint = "", ErrorCode code = CODE)                 \
            : BASE(message, hint, code) {}                                                                             \
    };

namespace detail {
class Root : public Error { // turns the order of the arguments, so that all of the tree is made alike
  public:
    Root(const std::string &message, const std::string &hint, ErrorCode code) : Error(code, message, hint) {}
};
} // namespace detail

CLIP_EXPORT_ERROR(BundleError, detail::Root, ErrorCode::bundle)
CLIP_EXPORT_ERROR(BundleNotFoundError, BundleError, ErrorCode::bundle_not_found)
CLIP_EXPORT_ERROR(BundleSchemaError, BundleError, ErrorCode::bundle_schema)
CLIP_EXPORT_ERROR(BundleIntegrityError, BundleError, ErrorCode::bundle_integrity)
CLIP_EXPORT_ERROR(InputError, detail::Root, ErrorCode::input)
CLIP_EXPORT_ERROR(TextError, InputError, ErrorCode::text)
CLIP_EXPORT_ERROR(ImageError, InputError, ErrorCode::image)
CLIP_EXPORT_ERROR(BackendError, detail::Root, ErrorCode::backend)
CLIP_EXPORT_ERROR(NoPlanError, BackendError, ErrorCode::no_plan)
CLIP_EXPORT_ERROR(DeviceError, BackendError, ErrorCode::device)
CLIP_EXPORT_ERROR(MissingDependencyError, detail::Root, ErrorCode::missing_dependency)
CLIP_EXPORT_ERROR(SpecError, detail::Root, ErrorCode::spec)

#undef CLIP_EXPORT_ERROR

} // namespace clip_export
