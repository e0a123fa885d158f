import Foundation
import MedPhiKit
import Testing

@testable import MedPhiSession

@Suite("Words of the app")
struct WordingTests {
    @Test("it says that it is not a medical device, and that it opens no connection")
    func saysWhatItIs() {
        #expect(Wording.notADevice.hasPrefix("Not a medical device."))
        #expect(Wording.noModel.contains("opens no connection"))
    }

    @Test(
        "sizes read as on a disk",
        arguments: [
            (999, "999 bytes"), (1000, "1.0 kB"), (5_002_852, "5.0 MB"), (2_140_000_000, "2.1 GB"),
        ])
    func sizes(_ bytes: Int, _ text: String) { #expect(Wording.size(bytes) == text) }

    @Test("numbers of things", arguments: [(0, "0 turns"), (1, "1 turn"), (2, "2 turns")])
    func counts(_ number: Int, _ text: String) { #expect(Wording.count(number, "turn") == text) }

    @Test("times", arguments: [(0.123, "0.12 s"), (12.4, "12 s")])
    func times(_ value: Double, _ text: String) { #expect(Wording.seconds(value) == text) }

    @Test("every way to end that is no end is said")
    func endings() {
        #expect(Wording.ending(.endOfTurn) == nil && Wording.ending(.stopString("x")) == nil)
        for reason in [StopReason.maxTokens, .contextFull, .cancelled] {
            #expect(Wording.ending(reason)?.hasPrefix("The note is cut off: ") == true)
        }
    }

    @Test("too little memory is said with what to do")
    func memory() throws {
        let model = try Scripts.model(Scripts.backend(saying: "x"))
        #expect(ModelCard(model, available: 100_000_000).warning == nil)
        #expect(ModelCard(model, available: 5_000_000).warning?.contains("context of") == true)
        #expect(
            ModelCard(model, available: 1_000_000).warning?.contains("Close other apps") == true)
    }

    @Test("no source of the app opens a connection or writes a log")
    func noConnection() throws {
        let sources = Scripts.root.appendingPathComponent("examples/MedPhiApp/Sources")
        let files = FileManager.default
        let found = try #require(files.enumerator(at: sources, includingPropertiesForKeys: nil))
        for case let url as URL in found where url.pathExtension == "swift" {
            let text = try String(contentsOf: url, encoding: .utf8)
            for word in ["URLSession", "Network", "os_log", "Logger", "NSLog", "UserDefaults"] {
                #expect(!text.contains(word), "\(url.lastPathComponent) has \(word)")
            }
        }
    }
}
