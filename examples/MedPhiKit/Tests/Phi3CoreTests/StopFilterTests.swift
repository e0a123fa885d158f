import Phi3Core
import Testing

@Suite("Stop filter")
struct StopFilterTests {
    private func run(_ stops: [String], _ pieces: [String]) throws -> ([String], String?) {
        var filter = try StopFilter(stops)
        var out = pieces.map { filter.push($0).text }
        out.append(filter.flush().text)
        return (out, filter.stop)
    }

    @Test("text that could begin a stop string is withheld until it is decided")
    func holdsBack() throws {
        #expect(try run(["END"], ["aE", "N", "x", "E"]) == (["a", "", "ENx", "", "E"], nil))
        #expect(try run(["END"], ["aE", "N", "Dx", "y"]) == (["a", "", "", "", ""], "END"))
    }

    @Test("a stop string that begins inside another beginning is found")
    func overlaps() throws {
        #expect(try run(["aab"], ["aaab"]) == (["a", ""], "aab"))
        #expect(try run(["abac"], ["ab", "abac", "d"]) == (["", "ab", "", ""], "abac"))
    }

    @Test("the first to be complete ends the text, and of two at one place the longer")
    func first() throws {
        #expect(try run(["b", "abc"], ["xabc"]) == (["xa", ""], "b"))
        #expect(try run(["c", "abc"], ["xabc"]) == (["x", ""], "abc"))
    }

    @Test("the text does not depend on how it was cut")
    func chunks() throws {
        var random = SplitMix(10)
        let letters = ["a", "b", "\n", "é", "e", "\u{301}"]
        for _ in 0..<500 {
            func text(_ count: Int) -> String {
                (0..<count).map { _ in letters.randomElement(using: &random) ?? "" }.joined()
            }
            let stops = (0..<3).map { _ in text(Int.random(in: 1...3, using: &random)) }
            let scalars = Array(text(30).unicodeScalars)
            var pieces: [String] = []
            var piece = ""
            for scalar in scalars {
                piece.unicodeScalars.append(scalar)
                if random.next() % 3 == 0 {
                    pieces.append(piece)
                    piece = ""
                }
            }
            let (out, stop) = try run(stops, pieces + [piece])
            let (expected, expectedStop) = plain(scalars, stops)
            #expect(same(out.joined(), expected))
            #expect(stop.map { Array($0.utf8) } == expectedStop.map { Array($0.utf8) })
        }
    }

    /// The rule as plain as it can be written.
    private func plain(_ scalars: [Unicode.Scalar], _ stops: [String]) -> (String, String?) {
        let longest = stops.sorted { $0.unicodeScalars.count > $1.unicodeScalars.count }
        func text(_ part: ArraySlice<Unicode.Scalar>) -> String {
            part.reduce(into: "") { $0.unicodeScalars.append($1) }
        }
        for end in 0...scalars.count {
            for stop in longest
            where scalars[..<end].suffix(stop.unicodeScalars.count)
                .elementsEqual(stop.unicodeScalars)
            {
                return (text(scalars[..<(end - stop.unicodeScalars.count)]), stop)
            }
        }
        return (text(scalars[...]), nil)
    }

    @Test("a long stop string that nearly comes takes time that grows with the text alone")
    func longStop() throws {
        func seconds(_ count: Int) throws -> Double {
            let stop = String(repeating: "a", count: count) + "b"
            let text = String(repeating: "a", count: 2 * count)
            var filter = try StopFilter([stop])
            var out = 0
            let time = processorSeconds { out = filter.push(text).text.utf8.count }
            #expect(out == count && filter.flush().text.utf8.count == count)
            return time
        }
        // Quadratic time would be 256 times as long.
        #expect(try seconds(160_000) < 64 * max(seconds(10_000), 1e-3))
    }

    @Test("without stop strings everything passes at once, and an empty one is refused")
    func edges() throws {
        #expect(try run([], ["a", "b"]) == (["a", "b", ""], nil))
        #expect(throws: Phi3Error.self) { try StopFilter(["a", ""]) }
    }
}
