import Foundation

/// Why a text is not JSON, and where.
public struct JSONSyntaxError: Error, Sendable, Equatable, CustomStringConvertible {
    /// What was found.
    public var what: String
    /// The offset of the byte where it was found.
    public var offset: Int

    /// The reason with its place.
    public var description: String { "\(what) at byte \(offset)" }
}

extension JSONValue {
    /// Parses a whole JSON text in UTF-8.
    ///
    /// - Parameter data: the bytes; a byte order mark before the value is not JSON.
    /// - Throws: `JSONSyntaxError` for anything RFC 8259 does not allow, for a name that comes twice
    ///   in an object, for numbers without a finite value, for text that is not UTF-8, and for more
    ///   than 200 levels of nesting.
    public init(parsing data: Data) throws {
        let bytes = [UInt8](data)
        self = try JSONValue(parsing: bytes)
    }

    /// Parses a whole JSON text; see `init(parsing:)` for data.
    public init(parsing text: String) throws {
        self = try JSONValue(parsing: Array(text.utf8))
    }

    init(parsing bytes: [UInt8]) throws {
        let result = bytes.withUnsafeBufferPointer { buffer -> Result<JSONValue, JSONSyntaxError> in
            var parser = JSONParser(bytes: buffer)
            do throws(JSONSyntaxError) {
                return .success(try parser.document())
            } catch {
                return .failure(error)
            }
        }
        self = try result.get()
    }
}

private struct JSONParser {
    let bytes: UnsafeBufferPointer<UInt8>
    var at = 0
    static let deepest = 200

    init(bytes: UnsafeBufferPointer<UInt8>) { self.bytes = bytes }

    mutating func document() throws(JSONSyntaxError) -> JSONValue {
        let value = try value(depth: 0)
        skipSpace()
        if at < bytes.count { throw error("something after the value") }
        return value
    }

    private func error(_ what: String) -> JSONSyntaxError {
        JSONSyntaxError(what: what, offset: at)
    }

    private var next: UInt8? { at < bytes.count ? bytes[at] : nil }

    private mutating func skipSpace() {
        while at < bytes.count {
            switch bytes[at] {
            case 0x20, 0x09, 0x0A, 0x0D: at += 1
            default: return
            }
        }
    }

    private mutating func take(_ byte: UInt8) -> Bool {
        guard next == byte else { return false }
        at += 1
        return true
    }

    private mutating func value(depth: Int) throws(JSONSyntaxError) -> JSONValue {
        if depth > JSONParser.deepest { throw error("more than \(JSONParser.deepest) levels") }
        skipSpace()
        switch next {
        case UInt8(ascii: "{"): return try object(depth: depth)
        case UInt8(ascii: "["): return try array(depth: depth)
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .bool(true))
        case UInt8(ascii: "f"): return try word("false", .bool(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        case nil: throw error("the end of the text instead of a value")
        default: return try number()
        }
    }

    private mutating func word(
        _ text: StaticString, _ value: JSONValue
    ) throws(JSONSyntaxError) -> JSONValue {
        let count = text.utf8CodeUnitCount
        guard bytes.count - at >= count else { throw error("a cut word") }
        for i in 0..<count where bytes[at + i] != text.utf8Start[i] { throw error("no JSON value") }
        at += count
        return value
    }

    private mutating func array(depth: Int) throws(JSONSyntaxError) -> JSONValue {
        at += 1
        var items: [JSONValue] = []
        skipSpace()
        if take(UInt8(ascii: "]")) { return .array(items) }
        while true {
            items.append(try value(depth: depth + 1))
            skipSpace()
            if take(UInt8(ascii: "]")) { return .array(items) }
            if !take(UInt8(ascii: ",")) { throw error("no comma and no end of a list") }
        }
    }

    private mutating func object(depth: Int) throws(JSONSyntaxError) -> JSONValue {
        at += 1
        var members = JSONObject()
        skipSpace()
        if take(UInt8(ascii: "}")) { return .object(members) }
        while true {
            skipSpace()
            guard next == UInt8(ascii: "\"") else { throw error("no name of a member") }
            let begin = at
            let name = try string()
            if members[name] != nil {
                throw JSONSyntaxError(
                    what: "'\(printable(name))' twice in one object", offset: begin)
            }
            skipSpace()
            if !take(UInt8(ascii: ":")) { throw error("no colon after a name") }
            members[name] = try value(depth: depth + 1)
            skipSpace()
            if take(UInt8(ascii: "}")) { return .object(members) }
            if !take(UInt8(ascii: ",")) { throw error("no comma and no end of an object") }
        }
    }

    private mutating func number() throws(JSONSyntaxError) -> JSONValue {
        let begin = at
        _ = take(UInt8(ascii: "-"))
        let first = at
        skipDigits()
        let digits = at - first
        if digits == 0 || (digits > 1 && bytes[first] == UInt8(ascii: "0")) {
            at = begin
            throw error("no JSON value")
        }
        var whole = true
        if take(UInt8(ascii: ".")) {
            whole = false
            let fraction = at
            skipDigits()
            if at == fraction { throw error("no digit after a decimal point") }
        }
        if next == UInt8(ascii: "e") || next == UInt8(ascii: "E") {
            at += 1
            whole = false
            if !take(UInt8(ascii: "+")) { _ = take(UInt8(ascii: "-")) }
            let exponent = at
            skipDigits()
            if at == exponent { throw error("no digit in an exponent") }
        }
        let text = String(decoding: bytes[begin..<at], as: UTF8.self)
        if whole, let value = Int(text) { return .integer(value) }
        guard let value = Double(text), value.isFinite else {
            throw JSONSyntaxError(what: "a number beyond all bounds", offset: begin)
        }
        return .number(value)
    }

    private mutating func skipDigits() {
        while let byte = next, byte >= 0x30, byte <= 0x39 { at += 1 }
    }

    private mutating func string() throws(JSONSyntaxError) -> String {
        at += 1
        let begin = at
        while let byte = next, byte != UInt8(ascii: "\""), byte != UInt8(ascii: "\\"), byte >= 0x20
        {
            at += 1
        }
        guard next == UInt8(ascii: "\"") else { return try escapedString(from: begin) }
        let text = try utf8(bytes[begin..<at])
        at += 1
        return text
    }

    private mutating func escapedString(from begin: Int) throws(JSONSyntaxError) -> String {
        var content = Array(bytes[begin..<at])
        while let byte = next {
            switch byte {
            case UInt8(ascii: "\""):
                let text = try content.withUnsafeBufferPointer { (all) throws(JSONSyntaxError) in
                    try utf8(all[...])
                }
                at += 1
                return text
            case UInt8(ascii: "\\"):
                at += 1
                try escape(into: &content)
            case 0..<0x20:
                throw error("a control character in a text")
            default:
                content.append(byte)
                at += 1
            }
        }
        throw error("the end of the file in a text")
    }

    private mutating func escape(into content: inout [UInt8]) throws(JSONSyntaxError) {
        guard let byte = next else { throw error("the end of the file in a text") }
        at += 1
        switch byte {
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): content.append(byte)
        case UInt8(ascii: "b"): content.append(0x08)
        case UInt8(ascii: "f"): content.append(0x0C)
        case UInt8(ascii: "n"): content.append(0x0A)
        case UInt8(ascii: "r"): content.append(0x0D)
        case UInt8(ascii: "t"): content.append(0x09)
        case UInt8(ascii: "u"):
            let scalar = try unicodeEscape()
            content.append(contentsOf: UTF8.encode(scalar).map { Array($0) } ?? [])
        default:
            throw error("an unknown escape")
        }
    }

    private mutating func unicodeEscape() throws(JSONSyntaxError) -> Unicode.Scalar {
        let high = try hex()
        var value = UInt32(high)
        if (0xD800..<0xDC00).contains(high) {
            guard take(UInt8(ascii: "\\")), take(UInt8(ascii: "u")) else {
                throw error("half a surrogate pair")
            }
            let low = try hex()
            guard (0xDC00..<0xE000).contains(low) else { throw error("half a surrogate pair") }
            value = 0x10000 + ((UInt32(high) - 0xD800) << 10) + (UInt32(low) - 0xDC00)
        }
        guard let scalar = Unicode.Scalar(value) else { throw error("half a surrogate pair") }
        return scalar
    }

    private mutating func hex() throws(JSONSyntaxError) -> UInt16 {
        var value: UInt16 = 0
        for _ in 0..<4 {
            guard let byte = next, let digit = hexDigit(byte) else {
                throw error("no four hex digits")
            }
            value = value << 4 | digit
            at += 1
        }
        return value
    }

    private func hexDigit(_ byte: UInt8) -> UInt16? {
        switch byte {
        case 0x30...0x39: return UInt16(byte - 0x30)
        case 0x41...0x46: return UInt16(byte - 0x41 + 10)
        case 0x61...0x66: return UInt16(byte - 0x61 + 10)
        default: return nil
        }
    }

    private func utf8(_ part: Slice<UnsafeBufferPointer<UInt8>>) throws(JSONSyntaxError) -> String {
        guard let text = String(validating: part, as: UTF8.self) else { throw error("not UTF-8") }
        return text
    }
}
