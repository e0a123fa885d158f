import Phi3Core

/// Where a model's weights come from: a checkpoint, or the package of a bundle.
protocol WeightSource: Sendable {
    /// The architecture.
    var config: ModelConfig { get }
    /// Tables of rotary angles, where they cannot be computed.
    var rotary: RotaryTables? { get }

    /// A matrix by its layer's name in a checkpoint.
    ///
    /// - Throws: `Phi3Error`: it is missing, or not (outputs, inputs).
    func matrix(_ layer: String, outputs: Int, inputs: Int) throws -> any RowSource

    /// The weight of a norm by its name in a checkpoint.
    ///
    /// - Throws: `Phi3Error`: it is missing, or has another length.
    func vector(_ layer: String, count: Int) throws -> [Float]
}

extension Checkpoint: WeightSource {
    var rotary: RotaryTables? { nil }

    func matrix(_ layer: String, outputs: Int, inputs: Int) throws -> any RowSource {
        guard let matrix = WeightMatrix(self, layer: layer), matrix.rows == outputs,
            matrix.columns == inputs
        else { throw missing(layer) }
        return matrix
    }

    func vector(_ layer: String, count: Int) throws -> [Float] {
        guard let tensor = tensor("\(layer).weight"), tensor.count == count else {
            throw missing(layer)
        }
        return tensor.floats()
    }

    private func missing(_ name: String) -> Phi3Error {
        .checkpoint(
            ErrorDetails(
                place: url.path, found: "no weight \(name)", expected: "all of the model's",
                advice: "Fetch the model again."))
    }
}
