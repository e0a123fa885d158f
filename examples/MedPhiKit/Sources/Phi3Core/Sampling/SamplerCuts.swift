import Foundation

extension Sampler {
    /// Cuts all but the `count` largest, and those equal to the last of them.
    static func cutTopK(_ scores: inout [Float], _ count: Int) {
        guard count < scores.count else { return }
        let least = scores[descending(scores)[count - 1]]
        for id in scores.indices where scores[id] < least { scores[id] = -.infinity }
    }

    /// Cuts what is not of the smallest set, likeliest first, that holds `share`.
    static func cutTopP(_ scores: inout [Float], _ share: Float) {
        let probabilities = softmax(scores)
        var sum: Float = 0
        for id in descending(scores) {
            sum += probabilities[id]
            // What stands before, computed from the sum as in Python: the rounding is the same.
            if !(sum - probabilities[id] < share) { scores[id] = -.infinity }
        }
    }

    /// Cuts what is less likely than `share` of the most likely one.
    static func cutMinP(_ scores: inout [Float], _ share: Float) {
        // Probabilities relative to the largest are differences of logits.
        let least = (scores.max() ?? 0) + log(share)
        for id in scores.indices where !(scores[id] >= least) { scores[id] = -.infinity }
    }

    /// Ids by falling score, equal ones by rising id.
    private static func descending(_ scores: [Float]) -> [Int] {
        var keys = scores.enumerated().map { id, score in
            // Adding zero makes -0 to 0; the two are equal scores with different bits.
            let bits = (-score + 0).bitPattern
            let rising = bits >> 31 == 1 ? ~bits : bits | 1 << 31
            return UInt64(rising) << 32 | UInt64(UInt32(truncatingIfNeeded: id))
        }
        keys.sort()
        return keys.map { Int(UInt32(truncatingIfNeeded: $0)) }
    }

    /// Probabilities, summed in the order of the ids.
    private static func softmax(_ scores: [Float]) -> [Float] {
        let largest = scores.max() ?? 0
        var out = scores.map { exponential($0 - largest) }
        let factor = 1 / out.reduce(0, +)
        for id in out.indices { out[id] *= factor }
        return out
    }

    /// e to the x by the polynomial of MLX's processor backend, to the bit: a probability that is
    /// one rounding off can put a token on the other side of a cut.
    static func exponential(_ x: Float) -> Float {
        if x.isNaN { return x }
        if x > 88 { return .infinity }
        if x < -88 { return 0 }
        let power = x * 1.442695
        let whole = (power + 0.5).rounded(.down)
        let rest = power - whole
        var value: Float = 1.535336188319500e-4
        value = Float(1.339887440266574e-3).addingProduct(value, rest)
        value = Float(9.618437357674640e-3).addingProduct(value, rest)
        value = Float(5.550332471162809e-2).addingProduct(value, rest)
        value = Float(2.402264791363012e-1).addingProduct(value, rest)
        value = Float(6.931472028550421e-1).addingProduct(value, rest)
        value = Float(1).addingProduct(value, rest)
        return Float(bitPattern: UInt32(truncatingIfNeeded: Int32(whole) + 127) << 23) * value
    }
}
