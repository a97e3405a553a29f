package awsapi

import (
	"testing"
	"time"
)

// The signature of AWS's own published example, "get-vanilla" of its test suite.
func TestSignatureIsAWSs(t *testing.T) {
	r := Request{Method: "GET", Host: "example.amazonaws.com", Path: "/"}
	r.Sign(Credentials{ID: "AKIDEXAMPLE", Secret: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}, "us-east-1", "service",
		time.Date(2015, 8, 30, 12, 36, 0, 0, time.UTC))
	const want = "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, " +
		"Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"
	if got := r.Headers["Authorization"]; got != want {
		t.Errorf("authorization is\n%s, want\n%s", got, want)
	}
}
