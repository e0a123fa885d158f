import Phi3Core

/// The names of what crosses the package's border.
enum Feature {
    static let ids = "inputIds", position = "position", mask = "causalMask"
    static let lastIndex = "lastIndex", ropeRow = "ropeRow", logits = "logits"
    static let keys = "keyCache", values = "valueCache"
}

/// An input, output or state, as one side describes it.
struct TensorForm: Equatable, Sendable {
    let name: String
    let shape: [Int]
    let type: Manifest.TensorFacts.Kind

    /// A form from its parts.
    init(name: String, shape: [Int], type: Manifest.TensorFacts.Kind) {
        self.name = name
        self.shape = shape
        self.type = type
    }

    /// The form that a manifest states.
    init(_ facts: Manifest.TensorFacts) {
        self.init(name: facts.name, shape: facts.shape, type: facts.type)
    }

    var shown: String { "\(type.rawValue) (\(shape.map(String.init).joined(separator: ", ")))" }
}

/// What a function takes, gives and keeps, as one side describes it.
struct FunctionForm: Sendable {
    var inputs: [TensorForm]
    var outputs: [TensorForm]
    var states: [TensorForm]

    /// A form from its parts.
    init(inputs: [TensorForm], outputs: [TensorForm], states: [TensorForm]) {
        self.inputs = inputs
        self.outputs = outputs
        self.states = states
    }

    /// The form that a manifest states.
    init(_ signature: Manifest.Signature) {
        inputs = signature.inputs.map { TensorForm($0) }
        outputs = signature.outputs.map { TensorForm($0) }
        states = signature.states.map { TensorForm($0) }
    }

    /// Tensors that are missing, unknown or of another form, one line each.
    ///
    /// - Parameters:
    ///   - function: its name.
    ///   - wanted: what it should be.
    ///   - sides: who says the one and who the other.
    func differences(
        _ function: String, from wanted: FunctionForm, sides: (found: String, wanted: String)
    ) -> [String] {
        let kinds = [
            ("input", inputs, wanted.inputs), ("output", outputs, wanted.outputs),
            ("state", states, wanted.states),
        ]
        return kinds.flatMap { kind, found, wanted in
            FunctionForm.differences("\(function) \(kind)", found, wanted, sides)
        }
    }

    private static func differences(
        _ place: String, _ found: [TensorForm], _ wanted: [TensorForm],
        _ sides: (found: String, wanted: String)
    ) -> [String] {
        let named = Dictionary(found.map { ($0.name, $0) }) { first, _ in first }
        var lines = wanted.compactMap { tensor -> String? in
            guard let other = named[tensor.name] else {
                return "\(place) \(tensor.name) is missing in \(sides.found)"
            }
            if other == tensor { return nil }
            return "\(place) \(tensor.name): \(other.shown) in \(sides.found), "
                + "\(sides.wanted) has \(tensor.shown)"
        }
        let known = Set(wanted.map(\.name))
        for name in named.keys where !known.contains(name) {
            lines.append("\(place) \(name) is not known to \(sides.wanted)")
        }
        return lines
    }
}
