package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/assay-id/assay/test/lab/site"
)

// push runs "assay evidence push" with a fresh token of the CI system, and returns when it was started.
func (p *pipeline) push(ctx context.Context, args ...string) (time.Time, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: p.ci}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", "ci"))
	if err != nil {
		return time.Time{}, err
	}
	now := time.Now()
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": issuer, "sub": "project:shop/app:ref:main", "aud": "assay", "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(),
		"project": "shop/app",
	}).Serialize()
	if err != nil {
		return time.Time{}, err
	}
	file := filepath.Join(p.Dir, "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		return time.Time{}, err
	}
	bundle, err := p.WriteBundle(ctx)
	if err != nil {
		return time.Time{}, err
	}
	asked := time.Now()
	_, err = site.Run(ctx, nil, filepath.Join(p.Bin, "assay"), append([]string{
		"evidence", "push", "-server", fmt.Sprintf("127.0.0.1:%d", p.Port), "-trustBundle", bundle, "-tokenFile", file, "-image", repository + "@" + p.image,
	}, args...)...)
	return asked, err
}

// scan writes a report of the image as Trivy writes it, and returns its path.
func (p *pipeline) scan(name string, critical ...string) string {
	found := []map[string]any{}
	for _, id := range critical {
		found = append(found, map[string]any{
			"VulnerabilityID": id, "PkgName": "libshop", "InstalledVersion": "1.0", "FixedVersion": "1.1", "Severity": "CRITICAL", "Status": "fixed",
			"PkgIdentifier": map[string]any{"PURL": "pkg:golang/example.org/libshop@1.0"},
		})
	}
	text, err := json.Marshal(map[string]any{
		"SchemaVersion": 2, "CreatedAt": time.Now().Format(time.RFC3339Nano), "ArtifactName": repository, "ArtifactType": "container_image",
		"Metadata": map[string]any{"ImageID": p.image},
		"Results": []any{map[string]any{
			"Target": "app", "Class": "lang-pkgs", "Type": "gobinary",
			"Packages":        []any{map[string]any{"Name": "libshop", "Version": "1.0"}},
			"Vulnerabilities": found,
		}},
	})
	path := filepath.Join(p.Dir, name)
	if err == nil {
		err = os.WriteFile(path, text, 0o600)
	}
	report(err)
	return path
}

// provenance writes how the image was made, signed by CI, and returns its path.
func (p *pipeline) provenance() (string, error) {
	return p.sign("provenance.dsse.json", p.signer, "https://slsa.dev/provenance/v1", map[string]any{
		"buildDefinition": map[string]any{
			"buildType": "https://example.org/build/v1", "externalParameters": map[string]any{},
			"resolvedDependencies": []any{map[string]any{"uri": "git+https://git.example.org/shop/app", "digest": map[string]any{"gitCommit": commit}}},
		},
		"runDetails": map[string]any{"builder": map[string]any{"id": issuer + "/runner"}},
	})
}

// vexStatement writes that the finding does not matter here, signed by the security team, and returns its path.
func (p *pipeline) vexStatement() (string, error) {
	now := time.Now().UTC().Format(time.RFC3339)
	return p.sign("vex.dsse.json", p.team, "https://openvex.dev/ns/v0.2.0", map[string]any{
		"@context": "https://openvex.dev/ns/v0.2.0", "@id": "https://example.org/vex/1", "author": "Security team", "timestamp": now, "version": 1,
		"statements": []any{map[string]any{
			"vulnerability": map[string]any{"name": cve},
			"products": []any{map[string]any{
				"@id": "pkg:oci/app@" + p.image, "subcomponents": []any{map[string]any{"@id": "pkg:golang/example.org/libshop@1.0"}},
			}},
			"status": "not_affected", "justification": "vulnerable_code_not_in_execute_path", "timestamp": now,
		}},
	})
}

// sign writes a statement about the image in a DSSE envelope, and returns its path.
func (p *pipeline) sign(name string, key *ecdsa.PrivateKey, predicateType string, predicate any) (string, error) {
	payload, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "predicateType": predicateType, "predicate": predicate,
		"subject": []any{map[string]any{"name": repository, "digest": map[string]any{"sha256": strings.TrimPrefix(p.image, "sha256:")}}},
	})
	if err != nil {
		return "", err
	}
	const kind = "application/vnd.in-toto+json"
	sum := sha256.Sum256(fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(payload), payload))
	signature, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		return "", err
	}
	envelope, err := json.Marshal(map[string]any{
		"payload": base64.StdEncoding.EncodeToString(payload), "payloadType": kind,
		"signatures": []any{map[string]any{"sig": base64.StdEncoding.EncodeToString(signature)}},
	})
	if err != nil {
		return "", err
	}
	path := filepath.Join(p.Dir, name)
	return path, os.WriteFile(path, envelope, 0o600)
}
