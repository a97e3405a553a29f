package awsapi_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/test/fake/aws"
)

// whoami is whose credentials a client has that was given none.
func whoami(t *testing.T, c *aws.Cloud) (string, error) {
	t.Helper()
	client, err := awsapi.NewClient(awsapi.Config{STSEndpoint: c.URL(), MetadataEndpoint: c.URL()})
	if err != nil {
		t.Fatal(err)
	}
	return client.Account(t.Context(), "us-east-1")
}

// environment is empty of all that tells of credentials, but for some variables.
func environment(t *testing.T, variables map[string]string) {
	t.Helper()
	for _, name := range []string{
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_SESSION_NAME",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
	} {
		t.Setenv(name, variables[name])
	}
}

func TestCredentialsOfAPod(t *testing.T) {
	const role = "arn:aws:iam::123456789012:role/assay-server"
	token := filepath.Join(t.TempDir(), "token")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(token, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("by the service account's token, as EKS projects it", func(t *testing.T) {
		c := aws.New()
		defer c.Close()
		c.WebTokens[role] = "eyJ.a.b"
		write("eyJ.a.b\n")
		environment(t, map[string]string{"AWS_ROLE_ARN": role, "AWS_WEB_IDENTITY_TOKEN_FILE": token})
		if account, err := whoami(t, c); err != nil || account != "123456789012" {
			t.Errorf("%q, %v", account, err)
		}
		for why, text := range map[string]string{"a token that is another's": "eyJ.c.d", "no token": "", "two lines": "a\nb", "a file without an end": strings.Repeat("x", 30_000)} {
			write(text)
			if account, err := whoami(t, c); err == nil || strings.Contains(err.Error(), "eyJ") {
				t.Errorf("%s: %q, %v", why, account, err)
			}
		}
	})
	t.Run("by the agent of Pod Identity", func(t *testing.T) {
		c := aws.New()
		defer c.Close()
		c.Role = aws.Key{ID: "ASIAPOD", Secret: "s", Token: "t", Account: "210987654321", ARN: "arn:aws:sts::210987654321:assumed-role/assay-server/pod"}
		c.Keys[c.Role.ID], c.PodToken = c.Role, "eyJ.pod"
		write("eyJ.pod")
		environment(t, map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": c.URL() + "/v1/credentials", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token})
		if account, err := whoami(t, c); err != nil || account != "210987654321" {
			t.Errorf("%q, %v", account, err)
		}
		write("eyJ.other")
		if account, err := whoami(t, c); err == nil {
			t.Errorf("with another token: %q", account)
		}
		t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://203.0.113.7/v1/credentials")
		if account, err := whoami(t, c); err == nil || !strings.Contains(err.Error(), "link") {
			t.Errorf("elsewhere: %q, %v", account, err)
		}
	})
	t.Run("in a pod with a role the node's is not taken in its place", func(t *testing.T) {
		c := aws.New()
		defer c.Close()
		c.GiveRole("node", aws.Key{ID: "ASIANODE", Secret: "s", Token: "t", Account: "111111111111", ARN: "arn:aws:sts::111111111111:assumed-role/node/i-1"})
		c.Trouble = func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/" {
				return false
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		write("eyJ.a.b")
		environment(t, map[string]string{"AWS_ROLE_ARN": role, "AWS_WEB_IDENTITY_TOKEN_FILE": token})
		if account, err := whoami(t, c); err == nil || c.Asked["latest"] != 0 {
			t.Errorf("%q, %v", account, err)
		}
	})
}
