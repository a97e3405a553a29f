package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/tools/cache"

	"github.com/assay-id/assay/server/wire/evidencev1"
)

// reportNews puts a report of Trivy Operator on the queue of reports. A report that was deleted stays
// evidence: taking a report away must not clear what it condemned.
func (s *sight) reportNews(_, after *unstructured.Unstructured) {
	if after != nil {
		s.desk.reports.Add(cache.ObjectName{Namespace: after.GetNamespace(), Name: after.GetName()}.String())
	}
}

// takeReports hands reports to the evidence API, one at a time, until the queue is shut.
func (d *desk) takeReports(ctx context.Context) {
	for {
		name, down := d.reports.Get()
		if down {
			return
		}
		err := d.takeReport(ctx, name)
		log := d.log.WithFields(logrus.Fields{"resource": "VulnerabilityReport/" + name})
		switch {
		case err == nil:
			d.reports.Forget(name)
		case status.Code(err) == codes.Unavailable, status.Code(err) == codes.ResourceExhausted, status.Code(err) == codes.DeadlineExceeded:
			log.WithError(err).Warn("a report could not be taken in; trying again")
			d.reports.AddRateLimited(name)
		default:
			// It will be no better another time.
			d.reports.Forget(name)
			if ctx.Err() == nil {
				log.WithError(err).Warn("a report was refused")
			}
		}
		d.reports.Done(name)
	}
}

var errNoDigest = errors.New("the report names no digest of an image, and a tag is none: it cannot be joined to what runs")

func (d *desk) takeReport(ctx context.Context, name string) error {
	u := seen[*unstructured.Unstructured](d.sees.findings, name)
	if u == nil {
		return nil
	}
	image, err := reportedImage(u)
	if err != nil {
		return err
	}
	report, _, err := unstructured.NestedMap(u.Object, "report")
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	// Without what changes with each write of the object, so that the same report is the same document.
	body, err := json.Marshal(map[string]any{
		"apiVersion": u.GetAPIVersion(), "kind": u.GetKind(), "report": report,
		"metadata": map[string]any{"name": u.GetName(), "namespace": u.GetNamespace()},
	})
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	stream, err := d.api.Evidence.Push(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Header{Header: &evidencev1.PushHeader{Image: image, Source: d.cfg.ReportSource}}})
	for rest := body; err == nil && len(rest) > 0; {
		n := min(len(rest), maxChunk)
		err = stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Chunk{Chunk: rest[:n]}})
		rest = rest[n:]
	}
	if err != nil && !errors.Is(err, io.EOF) { // EOF: the answer says why
		return err
	}
	_, err = stream.CloseAndRecv()
	return err
}

// maxChunk is what one message of a push may carry.
const maxChunk = 1 << 20

// reportedImage returns what image a report is about, as the evidence API takes it.
func reportedImage(u *unstructured.Unstructured) (string, error) {
	digest, _, _ := unstructured.NestedString(u.Object, "report", "artifact", "digest")
	if !strings.HasPrefix(digest, "sha256:") {
		return "", errNoDigest
	}
	repository, _, _ := unstructured.NestedString(u.Object, "report", "artifact", "repository")
	server, _, _ := unstructured.NestedString(u.Object, "report", "registry", "server")
	if repository == "" || server == "" {
		return digest, nil
	}
	return server + "/" + repository + "@" + digest, nil
}
