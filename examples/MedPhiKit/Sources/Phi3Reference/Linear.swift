import Foundation
import Phi3Core

/// A weight (outputs, inputs): in single precision, or as its file stores it and decoded on the way.
struct Linear: Sendable {
    let outputs: Int
    let inputs: Int
    private let storage: Storage

    private enum Storage: Sendable {
        case floats([Float])
        case packed(any RowSource)
    }

    /// A weight of a checkpoint or a package.
    ///
    /// - Parameters:
    ///   - matrix: the weight in its file.
    ///   - expanded: whether it is decoded once and for all.
    init(_ matrix: any RowSource, expanded: Bool) {
        outputs = matrix.rows
        inputs = matrix.columns
        storage = expanded ? .floats(matrix.floats()) : .packed(matrix)
    }

    /// A weight from its numbers.
    init(_ values: [Float], outputs: Int, inputs: Int) {
        self.outputs = outputs
        self.inputs = inputs
        storage = .floats(values)
    }

    /// y = x Wᵀ; x is (rows, inputs), y (rows, outputs).
    func apply(_ x: UnsafePointer<Float>, rows: Int, into y: UnsafeMutablePointer<Float>) {
        switch storage {
        case .floats(let values):
            values.withUnsafeBufferPointer { w in
                guard let w = w.baseAddress else { return }
                Kernels.multiply(x, rows: rows, inputs: inputs, w, outputs: outputs, into: y)
            }
        case .packed(let matrix):
            Kernels.multiply(x, rows: rows, inputs: inputs, outputs: outputs, into: y) {
                range, room in
                matrix.decode(rows: range, into: room)
            }
        }
    }

    /// Copies one row, e.g. the embedding of a token.
    func copy(row: Int, into target: UnsafeMutablePointer<Float>) {
        let room = UnsafeMutableBufferPointer(start: target, count: inputs)
        switch storage {
        case .floats(let values):
            _ = room.update(from: values[row * inputs..<(row + 1) * inputs])
        case .packed(let matrix): matrix.decode(rows: row..<row + 1, into: room)
        }
    }

    /// All numbers in single precision.
    func floats() -> [Float] {
        switch storage {
        case .floats(let values): return values
        case .packed(let matrix): return matrix.floats()
        }
    }
}

/// The change that an adapter makes beside a weight: y += scale · B (A x), and for DoRA a factor for
/// each output.
struct SideChange: Sendable {
    private let rank: Int
    private let outputs: Int
    private let a: Linear
    private let b: Linear
    private let scale: Float
    /// m / |W'| − 1 for each output; `nil` without DoRA.
    private let excess: [Float]?

    /// The change of one projection.
    ///
    /// - Parameters:
    ///   - change: the factors.
    ///   - scale: what A B is multiplied by.
    ///   - base: the weight beside which it stands; only DoRA looks at it.
    init(_ change: LowRank, scale: Double, base: Linear) {
        rank = change.rank
        outputs = base.outputs
        self.scale = Float(scale)
        a = Linear(change.a.transposed().floats(), outputs: rank, inputs: base.inputs)
        b = Linear(change.b.transposed().floats(), outputs: base.outputs, inputs: rank)
        guard let m = change.m?.floats() else {
            excess = nil
            return
        }
        let weight = SideChange.adapted(base, change, scale: scale, magnitude: false).floats()
        excess = (0..<base.outputs).map { row in
            let norm = SideChange.length(weight[row * base.inputs..<(row + 1) * base.inputs])
            return m[row] / max(norm, SideChange.tiny) - 1
        }
    }

    /// A row of zeros has length 0: 0 / tiny is 0 where 0 / 0 would poison the model.
    private static let tiny: Float = 1e-15

    private static func length(_ row: ArraySlice<Float>) -> Float {
        Float(row.reduce(0.0) { $0 + Double($1) * Double($1) }.squareRoot())
    }

    /// Adds the change to y = W x.
    func add(_ x: UnsafePointer<Float>, rows: Int, to y: UnsafeMutablePointer<Float>) {
        withUnsafeTemporaryAllocation(of: Float.self, capacity: rows * (rank + outputs)) { room in
            guard let inner = room.baseAddress else { return }
            let change = inner + rows * rank
            a.apply(x, rows: rows, into: inner)
            b.apply(inner, rows: rows, into: change)
            Kernels.add(scale, change, to: y, rows * outputs)
            guard let excess else { return }
            for row in 0..<rows {
                let out = y + row * outputs
                for column in 0..<outputs { out[column] += excess[column] * out[column] }
            }
        }
    }

    /// W' in single precision.
    ///
    /// - Parameters:
    ///   - base: W.
    ///   - change: the factors.
    ///   - scale: what A B is multiplied by.
    ///   - magnitude: whether DoRA's lengths are given to the rows.
    static func adapted(
        _ base: Linear, _ change: LowRank, scale: Double, magnitude: Bool = true
    ) -> Linear {
        var weight = base.floats()
        let inputs = base.inputs
        let rank = change.rank
        let a = change.a.transposed().floats()
        let b = change.b.transposed().floats()
        let m = magnitude ? change.m?.floats() : nil
        weight.withUnsafeMutableBufferPointer { weight in
            a.withUnsafeBufferPointer { a in
                guard let to = weight.baseAddress, let a = a.baseAddress else { return }
                for row in 0..<base.outputs {
                    for r in 0..<rank {
                        let factor = Float(scale) * b[row * rank + r]
                        Kernels.add(factor, a + r * inputs, to: to + row * inputs, inputs)
                    }
                }
            }
        }
        if let m {
            for row in 0..<base.outputs {
                let range = row * inputs..<(row + 1) * inputs
                let factor = m[row] / max(length(weight[range]), tiny)
                for i in range { weight[i] *= factor }
            }
        }
        return Linear(weight, outputs: base.outputs, inputs: inputs)
    }
}

/// A projection with what an adapter adds to it.
struct Projected: Sendable {
    var linear: Linear
    var change: SideChange?

    /// y = W x with the change; x is (rows, inputs), y (rows, outputs).
    func apply(_ x: UnsafePointer<Float>, rows: Int, into y: UnsafeMutablePointer<Float>) {
        linear.apply(x, rows: rows, into: y)
        change?.add(x, rows: rows, to: y)
    }
}
