import Foundation
import Testing

@testable import Phi3Core

@Suite struct JSONTests {
    @Test(
        arguments: [
            ("null", JSONValue.null), (" true ", .bool(true)), ("-0", .integer(0)),
            ("12", .integer(12)),
            ("-9223372036854775808", .integer(.min)),
            ("9223372036854775808", .number(9_223_372_036_854_775_808)),
            ("1.0", .number(1)), ("1E2", .number(100)), ("\"a\\u00e9\\n\"", .string("aé\n")),
            ("\"\\ud83d\\ude00\"", .string("😀")),
            ("[1,[2]]", .array([.integer(1), .array([.integer(2)])])),
            ("{\"a\":{}}", ["a": .object(JSONObject())]),
        ] as [(String, JSONValue)])
    func valuesAreReadAsTheyStand(text: String, value: JSONValue) throws {
        #expect(try JSONValue(parsing: text) == value)
    }

    @Test(arguments: [
        "", " ", "nul", "tru", "01", "-", "1.", "1e", ".5", "+1", "NaN", "Infinity", "1e999", "'a'",
        "\"a",
        "\"\\x\"", "\"\\u12\"", "\"\\ud800\"", "\"\\udc00\"", "\"\\ud800\\u0041\"", "\"\n\"",
        "[1,]", "[1 2]",
        "{\"a\" 1}", "{\"a\":1,}", "{a:1}", "{\"a\":1,\"a\":2}", "1 2", "\u{FEFF}1", "[", "{",
        "{\"a\"",
    ])
    func whatIsNoJSONIsRefused(text: String) {
        #expect(throws: JSONSyntaxError.self) { try JSONValue(parsing: text) }
    }

    @Test func bytesThatAreNoUTF8AreRefused() {
        for bytes in [
            [0x22, 0xFF, 0x22], [0x22, 0xC0, 0x80, 0x22], [0x22, 0xED, 0xA0, 0x80, 0x22],
        ] as [[UInt8]] {
            #expect(throws: JSONSyntaxError.self) { try JSONValue(parsing: Data(bytes)) }
        }
    }

    @Test func nestingIsReadUpToItsLimitAndRefusedBeyond() throws {
        let deep = { (levels: Int) in
            String(repeating: "[", count: levels) + String(repeating: "]", count: levels)
        }
        #expect(try JSONValue(parsing: deep(200)).array?.count == 1)
        #expect(throws: JSONSyntaxError.self) { try JSONValue(parsing: deep(300)) }
        #expect(throws: JSONSyntaxError.self) {
            try JSONValue(parsing: String(repeating: "[{\"a\":", count: 100_000))
        }
    }

    /// The threads of Swift's tasks have half a mebibyte on Apple's systems.
    @Test func theDeepestTextNeedsLittleStack() async throws {
        let deep =
            String(repeating: "[{\"a\":", count: 100) + "0" + String(repeating: "}]", count: 100)
        let isSame = await withCheckedContinuation { done in
            let thread = Thread {
                let first = try? JSONValue(parsing: deep)
                let second = try? JSONValue(parsing: first?.text(.pretty) ?? "")
                done.resume(returning: first != nil && first == second)
            }
            thread.stackSize = 512 << 10
            thread.start()
        }
        #expect(isSame)
    }

    @Test func namesAreComparedScalarByScalar() throws {
        // Canonically equivalent, and two entries of Phi-3's vocabulary.
        let value = try JSONValue(parsing: "{\"\u{3AC}\":1,\"\u{1F71}\":2,\"\u{FEFF}a\":3,\"a\":4}")
        #expect(value.object?.count == 4)
        #expect(value["\u{3AC}"] == .integer(1))
        #expect(value["\u{1F71}"] == .integer(2))
        #expect(value["\u{FEFF}a"] == .integer(3))
        #expect(value["a"] == .integer(4))
    }

    @Test func membersCanBeChangedAndTakenAway() {
        var members: JSONObject = ["a": 1.json, "b": 2.json, "c": 3.json]
        members["b"] = nil
        members["c"] = 4.json
        members["none"] = nil
        #expect(members.names == ["a", "c"])
        #expect(members["c"] == 4.json)
        #expect(members["b"] == nil)
    }

    @Test func textIsWrittenAsPythonWritesIt() {
        let value: JSONValue = ["b": .array([1.json, .number(2)]), "a": "é\u{7F}\"\\\n\u{1}😀"]
        #expect(
            value.text(.canonical) == #"{"a":"\u00e9\u007f\"\\\n\u0001\ud83d\ude00","b":[1,2.0]}"#)
        #expect(
            value.text(.line) == #"{"b": [1, 2.0], "a": "\u00e9\u007f\"\\\n\u0001\ud83d\ude00"}"#)
        #expect(JSONValue.array([]).text(.pretty) == "[]")
        let nested: JSONValue = ["a": .array([.null])]
        #expect(nested.text(.pretty) == "{\n  \"a\": [\n    null\n  ]\n}")
    }

    @Test func whatIsWrittenIsReadBack() throws {
        var generator = SplitMix(3)
        var value: JSONValue = ["a": ["b": .array([1.json, "x"])], "c": .null, "d": .number(0.1)]
        for _ in 0..<FileFixtures.fuzzCount(500) {
            let other = Spoiler.value(value, &generator)
            for style in [JSONValue.Style.line, .compact, .pretty] {
                #expect(try JSONValue(parsing: other.text(style)) == other)
            }
            if other.object != nil { value = other }
            if value.text().utf8.count > 4000 { value = ["a": .array([.null, "b"])] }
        }
    }

    @Test func spoiledTextNeverCrashes() throws {
        var generator = SplitMix(11)
        let text = Data(ManifestFixture.value().text(.pretty).utf8)
        for _ in 0..<FileFixtures.fuzzCount(1000) {
            let spoiled = Spoiler.bytes(text, &generator)
            do { _ = try JSONValue(parsing: spoiled) } catch { #expect(error is JSONSyntaxError) }
        }
    }
}

extension Int {
    /// The number as JSON.
    var json: JSONValue { .integer(self) }
}
