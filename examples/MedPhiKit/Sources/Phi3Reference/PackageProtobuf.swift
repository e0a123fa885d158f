/// Reads the fields of a protobuf message one after the other, as far as Core ML's model files need.
///
/// Nothing is trusted: a length that leaves the message, a number that is too long or a kind of field
/// that is not used today is an error. Messages are opened one by one, so no input makes it recurse.
struct ProtobufReader {
    /// One field.
    struct Field {
        /// Its number in the message's definition.
        let number: Int
        /// What it holds.
        let content: Content
    }

    /// What a field holds.
    enum Content {
        /// A whole number, a truth value or a case.
        case varint(UInt64)
        /// Text, bytes or another message.
        case bytes(ArraySlice<UInt8>)
        /// A number of four or eight bytes.
        case fixed
    }

    /// Why a message cannot be read.
    struct Damaged: Error {
        let what: String
    }

    private var rest: ArraySlice<UInt8>

    init(_ message: ArraySlice<UInt8>) { rest = message }

    /// The next field; `nil` at the end of the message.
    mutating func next() throws -> Field? {
        if rest.isEmpty { return nil }
        let tag = try varint()
        guard tag >> 3 > 0, tag >> 3 <= 536_870_911 else {
            throw Damaged(what: "a field without a number")
        }
        let number = Int(tag >> 3)
        switch tag & 7 {
        case 0: return Field(number: number, content: .varint(try varint()))
        case 1: return Field(number: number, content: try fixed(8))
        case 2:
            let count = try varint()
            guard count <= UInt64(rest.count) else {
                throw Damaged(what: "a field longer than its message")
            }
            return Field(number: number, content: .bytes(take(Int(count))))
        case 5: return Field(number: number, content: try fixed(4))
        default: throw Damaged(what: "a field of an unknown kind")
        }
    }

    private mutating func take(_ count: Int) -> ArraySlice<UInt8> {
        let taken = rest.prefix(count)
        rest = rest.dropFirst(count)
        return taken
    }

    private mutating func fixed(_ count: Int) throws -> Content {
        guard rest.count >= count else { throw Damaged(what: "a number that is cut short") }
        _ = take(count)
        return .fixed
    }

    private mutating func varint() throws -> UInt64 {
        var value: UInt64 = 0
        var shift: UInt64 = 0
        while let byte = rest.popFirst() {
            // Ten bytes hold 70 bits; the last one has room for a single bit.
            if shift == 63, byte > 1 { break }
            value |= UInt64(byte & 0x7F) << shift
            if byte < 0x80 { return value }
            shift += 7
            if shift > 63 { break }
        }
        throw Damaged(what: "a number that is cut short or too long")
    }
}

/// A message with the fields that weights need; all others are left alone.
struct ProtobufMessage {
    // A block of Phi-3-medium has some six thousand operations. A field may be two bytes, and what
    // is kept of it sixteen times as many.
    private static let mostFields = 1 << 20
    // Those that `PackageProgram` reads, of all kinds of messages.
    private static let known: Set<Int> = [1, 2, 3, 5, 502]

    private var messages: [Int: [ArraySlice<UInt8>]] = [:]
    private var numbers: [Int: UInt64] = [:]

    /// Reads the fields of a message.
    ///
    /// - Throws: `ProtobufReader.Damaged`: no message, or more fields than any program has.
    init(_ bytes: ArraySlice<UInt8>) throws {
        var reader = ProtobufReader(bytes)
        var count = 0
        while let field = try reader.next() {
            count += 1
            if count > ProtobufMessage.mostFields {
                throw ProtobufReader.Damaged(
                    what: "a message of more than \(ProtobufMessage.mostFields) fields")
            }
            guard ProtobufMessage.known.contains(field.number) else { continue }
            switch field.content {
            case .bytes(let content): messages[field.number, default: []].append(content)
            case .varint(let value): numbers[field.number] = value
            case .fixed: break
            }
        }
    }

    /// A whole number; 0 where it is not given, as protobuf has it.
    func number(_ field: Int) -> UInt64 { numbers[field] ?? 0 }

    /// The bytes of a repeated field.
    func all(_ field: Int) -> [ArraySlice<UInt8>] { messages[field] ?? [] }

    /// The bytes of a field that stands once; of several the last counts.
    func bytes(_ field: Int) -> ArraySlice<UInt8>? { messages[field]?.last }

    /// A message inside.
    func message(_ field: Int) throws -> ProtobufMessage? {
        try bytes(field).map { try ProtobufMessage($0) }
    }

    /// Text; empty where it is not given.
    func text(_ field: Int) throws -> String {
        guard let bytes = bytes(field) else { return "" }
        return try ProtobufMessage.text(bytes)
    }

    /// The texts of a repeated field.
    func texts(_ field: Int) throws -> [String] { try all(field).map(ProtobufMessage.text) }

    /// The entries of a map from text to messages; a key that comes twice is an error.
    func entries(_ field: Int) throws -> [String: ArraySlice<UInt8>] {
        var found: [String: ArraySlice<UInt8>] = [:]
        for bytes in all(field) {
            let entry = try ProtobufMessage(bytes)
            let key = try entry.text(1)
            guard found.updateValue(entry.bytes(2) ?? [], forKey: key) == nil else {
                throw ProtobufReader.Damaged(what: "a name that comes twice")
            }
        }
        return found
    }

    private static func text(_ bytes: ArraySlice<UInt8>) throws -> String {
        guard let text = String(validating: bytes, as: UTF8.self) else {
            throw ProtobufReader.Damaged(what: "text that is not UTF-8")
        }
        return text
    }
}
