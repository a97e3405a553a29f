package report

import (
	"bytes"
	"fmt"
	"syscall"
	"testing"
	"time"
)

// bigReport is a Trivy report of at least size bytes, with findings as long as real ones are.
func bigReport(size int) []byte {
	var b bytes.Buffer
	b.WriteString(`{"SchemaVersion":2,"CreatedAt":"2026-03-01T10:00:00Z","ArtifactName":"registry.example/big:1",
"ArtifactType":"container_image","Metadata":{"OS":{"Family":"debian","Name":"12.9"},"ImageID":"sha256:` +
		fmt.Sprintf("%064x", 1) + `"},"Results":[{"Target":"big (debian 12.9)","Class":"os-pkgs","Type":"debian","Vulnerabilities":[`)
	words := []string{"CRITICAL", "HIGH", "MEDIUM", "LOW", "UNKNOWN"}
	for i := 0; b.Len() < size; i++ {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `
        {
          "VulnerabilityID": "CVE-%d-%d",
          "VendorIDs": ["DSA-%d-1"],
          "PkgID": "package%d@1.2.%d-1",
          "PkgName": "package%d",
          "PkgIdentifier": {"PURL": "pkg:deb/debian/package%d@1.2.%d-1?arch=amd64\u0026distro=debian-12.9", "UID": "b75d2c78a42eae6e"},
          "InstalledVersion": "1.2.%d-1", "FixedVersion": "1.2.%d-2", "Status": "fixed",
          "Layer": {"Digest": "sha256:%064x", "DiffID": "sha256:%064x"},
          "SeveritySource": "nvd", "PrimaryURL": "https://avd.example/nvd/cve-%d",
          "DataSource": {"ID": "debian", "Name": "Debian Security Tracker", "URL": "https://salsa.example/security-tracker"},
          "Title": "package%d: something is not checked in \"parse_header()\"",
          "Description": "An issue was discovered in package%d through 5.0 patch 11.\nBy default, if it is run with its effective UID not equal to its real UID, it will drop privileges by setting its effective UID to its real UID. However, it does so incorrectly.\nOn systems that support \"saved UID\" functionality, the saved UID is not dropped. An attacker with command execution can use this for runtime loading and therefore regains privileges.",
          "Severity": "%s",
          "CweIDs": ["CWE-273"],
          "VendorSeverity": {"nvd": 3, "redhat": 1, "ubuntu": 1},
          "CVSS": {"nvd": {"V2Vector": "AV:L/AC:L/Au:N/C:C/I:C/A:C", "V3Vector": "CVSS:3.1/AV:L/AC:L/PR:L/UI:N/S:U/C:H/I:H/A:H", "V2Score": 7.2, "V3Score": 7.8}},
          "References": ["https://packets.example/files/155498", "https://access.example/security/cve/%d", "https://github.example/commit/951bdaad7a18cc0dc1036bba86b18b90874d39ff"],
          "PublishedDate": "2019-11-28T01:15:00Z", "LastModifiedDate": "2020-04-30T19:15:00Z"
        }`, 2000+i%25, 1000+i, i/3, i%500, i%10, i%500, i%500, i%10, i%10, i%10, i, i, i, i, i, words[i%len(words)], i)
	}
	b.WriteString("]}]}")
	return b.Bytes()
}

// inStatement wraps a report as cosign does.
func inStatement(report []byte) []byte {
	return fmt.Appendf(nil, `{"_type":"https://in-toto.io/Statement/v0.1","predicateType":"https://cosign.sigstore.dev/attestation/vuln/v1",
"subject":[{"name":"a","digest":{"sha256":"%064x"}}],"predicate":{"scanner":{"uri":"pkg:github/aquasecurity/trivy","result":%s},
"metadata":{"scanFinishedOn":"2026-03-01T10:00:00Z"}}}`, 1, report)
}

// BenchmarkParse10MiB measures the promise that 10 MiB take less than 200 ms of a processor; cpu-ms/op
// is that number, whatever else the machine does.
func BenchmarkParse10MiB(b *testing.B) {
	report := bigReport(10 << 20)
	for _, c := range []struct {
		name string
		data []byte
	}{{"bare", report}, {"statement", inStatement(report)}} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(c.data)))
			b.ReportAllocs()
			start := processorTime(b)
			for b.Loop() {
				d, err := Parse(c.data)
				if err != nil {
					b.Fatal(err)
				}
				if len(d.Report.Findings) < 3000 {
					b.Fatalf("%d findings", len(d.Report.Findings))
				}
			}
			spent := processorTime(b) - start
			b.ReportMetric(float64(spent.Microseconds())/1000/float64(b.N), "cpu-ms/op")
		})
	}
}

// processorTime is what this process has used, in user and kernel mode.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Skipf("processor time is not known here: %v", err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
