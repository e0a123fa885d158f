/// Typed access to parsed JSON that collects every problem with its key path.
///
/// A value that does not fit adds a line and a stand-in takes its place, so that one reading finds
/// everything that is wrong; the caller throws the stand-ins away when there was any line.
struct ManifestReader {
    /// Lines about what does not fit.
    final class Problems {
        var lines: [String] = []
    }

    let value: JSONValue
    let path: String
    let problems: Problems

    /// What every JSON reader holds exactly.
    static let mostWhole = (1 << 53) - 1

    private func wrong(_ expected: String) {
        problems.lines.append("\(path) is \(value.shown), expected \(expected)")
    }

    private func inner(_ name: String) -> String {
        path.isEmpty ? printable(name, limit: 40) : "\(path).\(printable(name, limit: 40))"
    }

    /// Reads a member; one that is missing adds a line and gives the stand-in.
    func member<Value>(
        _ name: String, or standIn: Value, _ read: (ManifestReader) -> Value
    ) -> Value {
        guard let members = value.object else {
            wrong("an object")
            return standIn
        }
        guard let found = members[name] else {
            problems.lines.append("\(inner(name)) is missing")
            return standIn
        }
        return read(ManifestReader(value: found, path: inner(name), problems: problems))
    }

    /// Whether this is an object; adds a line where it is not.
    func isObject() -> Bool {
        if value.object != nil { return true }
        wrong("an object")
        return false
    }

    /// A member that is an object, read by `read` where it is one.
    func section<Value>(_ name: String, _ read: (ManifestReader) -> Value?) -> Value? {
        member(name, or: nil) { $0.isObject() ? read($0) : nil }
    }

    func text() -> String {
        if let text = value.string { return text }
        wrong("text")
        return ""
    }

    func whole() -> Int {
        if let whole = value.integer, (0...ManifestReader.mostWhole).contains(whole) {
            return whole
        }
        wrong("a whole number from 0 up")
        return 0
    }

    func number() -> Double {
        if case .integer(let whole) = value, whole.magnitude <= UInt(ManifestReader.mostWhole) {
            return Double(whole)
        }
        if case .number(let number) = value { return number }
        wrong("a number")
        return 0
    }

    func flag() -> Bool {
        if let flag = value.bool { return flag }
        wrong("true or false")
        return false
    }

    func optional<Value>(_ read: (ManifestReader) -> Value) -> Value? {
        value.isNull ? nil : read(self)
    }

    func anyObject() -> JSONObject {
        if let members = value.object { return members }
        wrong("an object")
        return JSONObject()
    }

    func list<Item>(_ read: (ManifestReader) -> Item?) -> [Item] {
        guard let items = value.array else {
            wrong("a list")
            return []
        }
        return items.enumerated().compactMap { index, item in
            read(ManifestReader(value: item, path: "\(path)[\(index)]", problems: problems))
        }
    }

    func map<Item>(_ read: (ManifestReader) -> Item?) -> [String: Item] {
        guard let members = value.object else {
            wrong("an object")
            return [:]
        }
        var found: [String: Item] = [:]
        for (name, item) in members {
            let place = ManifestReader(value: item, path: inner(name), problems: problems)
            if let read = read(place), found.updateValue(read, forKey: name) != nil {
                problems.lines.append("\(inner(name)) is there twice")
            }
        }
        return found
    }

    func choice<Value: RawRepresentable & CaseIterable>(or standIn: Value) -> Value
    where Value.RawValue == String {
        if let found = value.string.flatMap(Value.init(rawValue:)) { return found }
        wrong("one of " + Value.allCases.map { "'\($0.rawValue)'" }.joined(separator: ", "))
        return standIn
    }

    /// Text that can only be one thing.
    func constant(_ text: String) -> String {
        if value.string != text { wrong("'\(text)'") }
        return text
    }
}

extension ManifestReader {
    func text(_ name: String) -> String { member(name, or: "") { $0.text() } }
    func whole(_ name: String) -> Int { member(name, or: 0) { $0.whole() } }
    func number(_ name: String) -> Double { member(name, or: 0) { $0.number() } }
    func flag(_ name: String) -> Bool { member(name, or: false) { $0.flag() } }
    func anyObject(_ name: String) -> JSONObject {
        member(name, or: JSONObject()) { $0.anyObject() }
    }
    func texts(_ name: String) -> [String] { member(name, or: []) { $0.list { $0.text() } } }
    func textMap(_ name: String) -> [String: String] {
        member(name, or: [:]) { $0.map { $0.text() } }
    }

    func optionalText(_ name: String) -> String? {
        member(name, or: nil) { $0.optional { $0.text() } }
    }

    func optionalWhole(_ name: String) -> Int? {
        member(name, or: nil) { $0.optional { $0.whole() } }
    }

    func optionalNumber(_ name: String) -> Double? {
        member(name, or: nil) { $0.optional { $0.number() } }
    }

    func choice<Value: RawRepresentable & CaseIterable>(_ name: String, or standIn: Value) -> Value
    where Value.RawValue == String {
        member(name, or: standIn) { $0.choice(or: standIn) }
    }

    func constant(_ name: String, _ text: String) -> String {
        member(name, or: text) { $0.constant(text) }
    }

    func list<Item>(_ name: String, _ read: (ManifestReader) -> Item?) -> [Item] {
        member(name, or: []) { $0.list(read) }
    }
}
