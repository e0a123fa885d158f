import Foundation
import Phi3Core

/// Cosines and sines of all positions of a package, (positions, pairs) for each set of factors, with
/// LongRoPE's stretch in them.
struct RotaryTables: Sendable {
    /// Pairs that turn.
    let pairs: Int
    /// Positions of each set.
    let context: Int
    /// Whether a second set with the long factors stands below the first.
    let hasLong: Bool
    let cosines: [Float]
    let sines: [Float]
}

/// Cosines and sines that turn queries and keys by their positions.
struct Rotation {
    /// Pairs that turn.
    let pairs: Int
    /// (rows, pairs) each, LongRoPE's stretch included.
    private let cosines: [Float]
    private let sines: [Float]

    /// The angles of tokens that follow each other.
    ///
    /// - Parameters:
    ///   - config: the model's architecture.
    ///   - tables: the package's angles; `nil`: they are computed.
    ///   - position: of the first one.
    ///   - rows: how many.
    ///   - long: whether LongRoPE's long factors apply.
    init(_ config: ModelConfig, _ tables: RotaryTables?, position: Int, rows: Int, long: Bool) {
        if let tables {
            pairs = tables.pairs
            let begin = (long && tables.hasLong ? tables.context : 0) + position
            let range = begin * pairs..<(begin + rows) * pairs
            cosines = Array(tables.cosines[range])
            sines = Array(tables.sines[range])
            return
        }
        pairs = config.rotarySize / 2
        let factors = long ? config.longRoPE?.longFactor : config.longRoPE?.shortFactor
        let stretch = config.longRoPE?.attentionFactor ?? 1
        var cosines: [Float] = []
        var sines: [Float] = []
        cosines.reserveCapacity(rows * pairs)
        sines.reserveCapacity(rows * pairs)
        let speeds = (0..<pairs).map { pair in
            let plain = pow(config.ropeTheta, Double(2 * pair) / Double(config.rotarySize))
            return 1 / (plain * (factors?[pair] ?? 1))
        }
        for row in 0..<rows {
            for speed in speeds {
                let angle = Double(position + row) * speed
                cosines.append(Float(cos(angle) * stretch))
                sines.append(Float(sin(angle) * stretch))
            }
        }
        self.cosines = cosines
        self.sines = sines
    }

    /// Turns one head of one row in place; the numbers behind the pairs stay.
    func turn(_ head: UnsafeMutablePointer<Float>, row: Int) {
        for pair in 0..<pairs {
            let c = cosines[row * pairs + pair]
            let s = sines[row * pairs + pair]
            let first = head[pair]
            let second = head[pair + pairs]
            head[pair] = first * c - second * s
            head[pair + pairs] = second * c + first * s
        }
    }
}
