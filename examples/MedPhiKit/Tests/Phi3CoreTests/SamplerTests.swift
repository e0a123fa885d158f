import Foundation
import Testing

@testable import Phi3Core

@Suite("Sampler")
struct SamplerTests {
    @Test(
        "ids and cuts are Python's for the same logits and seed",
        .enabled(if: Vectors.hasRecorded, "no checkout around"))
    func equalsPython() throws {
        var sampled = 0
        for item in try Vectors.cases("sampling") {
            func number(_ key: String) throws -> Double { try #require(item[key]?.double) }
            let options = SamplingOptions(
                temperature: try number("temperature"), topP: try number("top_p"),
                minP: try number("min_p"), repetitionPenalty: try number("repetition_penalty"),
                seed: try UInt64(#require(item["seed"]?.integer)))
            let written = try #require(item["written"]?.array).compactMap(\.integer).map(Int32.init)
            let logits = try recordedLogits(item)
            let sampler = try Sampler(options)
            let left = sampler.adjusted(logits, written: written).filter { $0 > -.infinity }.count
            #expect(left == item["left"]?.integer, "\(options)")
            #expect(
                Int(try sampler.next(logits: logits, written: written)) == item["id"]?.integer,
                "\(options)")
            sampled += options.temperature > 0 ? 1 : 0
        }
        #expect(sampled > 100)
    }

    /// The numbers that make_swift_vectors.py makes, exact in both languages.
    private func recordedLogits(_ item: JSONValue) throws -> [Float] {
        var state = try UInt32(#require(item["state"]?.integer))
        let shift = try UInt32(#require(item["shift"]?.integer))
        let scale = try Float(#require(item["scale"]?.double))
        return (0..<(try #require(item["count"]?.integer))).map { _ in
            state = state &* 1_664_525 &+ 1_013_904_223
            return (Float(state >> shift) / Float(1 << (29 - shift)) - 4) * scale
        }
    }

    @Test("top-k keeps the k largest and those equal to the last")
    func topK() throws {
        var random = SplitMix(9)
        for _ in 0..<100 {
            let logits = (0..<40).map { _ in Float(Int.random(in: -9...9, using: &random)) }
            let k = Int.random(in: 1...45, using: &random)
            let sampler = try Sampler(SamplingOptions(temperature: 1, topK: k))
            let left = sampler.adjusted(logits, written: [])
            let least = logits.sorted(by: >)[min(k, 40) - 1]
            #expect(left == logits.map { $0 >= least ? $0 : -.infinity })
        }
        let one = try Sampler(SamplingOptions(temperature: 10, topK: 1))
        #expect(try one.next(logits: [1, 3, 2], written: []) == 1)
    }

    @Test("suppressed ids are never chosen, not even when they are likeliest")
    func suppressed() throws {
        for temperature in [0, 1.0] {
            let sampler = try Sampler(
                SamplingOptions(temperature: temperature), suppressing: [3...63, -5...0, 90...99])
            let logits = [9] + [Float](repeating: 0, count: 2) + [Float](repeating: 9, count: 61)
            for number in 0..<50 {
                let written = [Int32](repeating: 1, count: number)
                #expect((1...2).contains(try sampler.next(logits: logits, written: written)))
            }
            #expect(throws: Phi3Error.self) {
                try sampler.next(logits: [1], written: [])
            }
        }
    }

    @Test("a draw depends on the seed and the number of the token alone")
    func draws() throws {
        let logits = [Float](repeating: 0, count: 1000)
        let first = try Sampler(SamplingOptions(temperature: 1, seed: 1))
        let second = try Sampler(SamplingOptions(temperature: 1, seed: 2))
        let ids = try (0..<20).map {
            try first.next(logits: logits, written: [Int32](repeating: 5, count: $0))
        }
        #expect(Set(ids).count > 10)
        #expect(try first.next(logits: logits, written: [7, 8]) == ids[2])
        #expect(try second.next(logits: logits, written: []) != ids[0])
    }

    @Test("draws follow the probabilities")
    func frequencies() throws {
        let logits = [0.1, 0.2, 0.7].map { Float(log($0)) }
        let sampler = try Sampler(SamplingOptions(temperature: 1, seed: 3))
        var counts = [0, 0, 0]
        for number in 0..<2000 {
            let written = [Int32](repeating: 0, count: number)
            counts[Int(try sampler.next(logits: logits, written: written))] += 1
        }
        // Four standard deviations of 2000 draws.
        for (count, share) in zip(counts, [0.1, 0.2, 0.7]) {
            let expected = 2000 * share
            #expect(abs(Double(count) - expected) < 4 * (expected * (1 - share)).squareRoot())
        }
    }

    @Test(
        "logits that are not numbers are an error", arguments: [Float.nan, .infinity, -.infinity])
    func notNumbers(_ value: Float) throws {
        let sampler = try Sampler()
        let error = #expect(throws: Phi3Error.self) {
            try sampler.next(logits: [0, value, 1], written: [])
        }
        #expect(error?.description.contains("id 1") == true)
        #expect(throws: Phi3Error.self) { try sampler.next(logits: [], written: []) }
    }

    @Test(
        "options outside their range are refused by name",
        arguments: [
            ("temperature", SamplingOptions(temperature: -0.1)),
            ("temperature", SamplingOptions(temperature: .nan)),
            ("topK", SamplingOptions(topK: -1)), ("topP", SamplingOptions(topP: 0)),
            ("topP", SamplingOptions(topP: 1.01)), ("minP", SamplingOptions(minP: 2)),
            ("repetitionPenalty", SamplingOptions(repetitionPenalty: 0.5)),
            ("seed", SamplingOptions(seed: .max)),
        ])
    func refusesOptions(_ name: String, _ options: SamplingOptions) {
        let error = #expect(throws: Phi3Error.self) { try Sampler(options) }
        #expect(error?.description.hasPrefix("\(name):") == true)
    }

    @Test("of equal scores the lower id is kept, and zero equals minus zero")
    func ties() throws {
        let sampler = try Sampler(SamplingOptions(temperature: 1, topP: 0.4))
        for logits: [Float] in [[-0.0, 0.0], [0.0, -0.0], [2, 2]] {
            let left = sampler.adjusted(logits, written: [])
            #expect(left[0] == logits[0] && left[1] == -.infinity)
        }
    }

    @Test("random numbers stay below 1, where the noise would be infinite")
    func uniform() {
        #expect(RandomBits.uniform(.max) < 1 && RandomBits.uniform(.max - 64) < 1)
        #expect(RandomBits.uniform(0) == 0 && RandomBits.uniform(1 << 31) == 0.5)
    }

    @Test("extreme options and logits give an id")
    func extremes() throws {
        let largest = Float.greatestFiniteMagnitude
        let logits = [largest, -largest, 0, .leastNonzeroMagnitude, -0.0]
        for temperature in [1e-45, 1e-38, 1e-3, 10, 1e-300] {
            for share in [1e-6, 0.5, 1] {
                let options = SamplingOptions(
                    temperature: temperature, topK: 3, topP: share, minP: share,
                    repetitionPenalty: 10)
                let id = try? Sampler(options).next(logits: logits, written: [0, 1, 99, -1])
                #expect(id == nil || (0..<5).contains(id ?? 0))
            }
        }
    }
}
