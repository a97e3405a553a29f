package plugin

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"github.com/assay-id/assay/attestor/external"
)

// Limits on what a program may write into our log.
const (
	maxLine    = 8 << 10 // bytes of a line
	maxFields  = 16
	maxValue   = 512
	lineRate   = 50 // lines a second
	lineBurst  = 500
	scanBuffer = 64 << 10
)

// logLines takes over what a program writes to its standard error: JSON as hclog writes it, or any text.
func logLines(r io.Reader, log logrus.FieldLogger) {
	in := bufio.NewReaderSize(r, scanBuffer)
	limit := rate.NewLimiter(lineRate, lineBurst)
	dropped := 0
	for {
		line, err := in.ReadSlice('\n')
		long := false
		for err == bufio.ErrBufferFull { //nolint:errorlint // bufio returns it as it is
			long = true
			_, err = in.ReadSlice('\n')
		}
		text := strings.TrimSpace(string(line))
		switch {
		case text == "":
		case !limit.Allow():
			dropped++
		default:
			if dropped > 0 {
				log.WithField("lines", dropped).Warn("plugin writes more than is logged; lines were left out")
				dropped = 0
			}
			logLine(log, text, long)
		}
		if err != nil {
			return
		}
	}
}

func logLine(log logrus.FieldLogger, text string, long bool) {
	if len(text) > maxLine {
		text, long = text[:maxLine], true
	}
	var line map[string]any
	if long || json.Unmarshal([]byte(text), &line) != nil {
		log.Info(external.Clip(text))
		return
	}
	message, _ := line["@message"].(string)
	level, _ := line["@level"].(string)
	fields := logrus.Fields{}
	for key, value := range line {
		if strings.HasPrefix(key, "@") || len(fields) == maxFields {
			continue
		}
		shown := fmt.Sprint(value)
		if len(shown) > maxValue {
			shown = shown[:maxValue] + "…"
		}
		fields["plugin_"+external.Clip(key)] = shown
	}
	entry := log.WithFields(fields)
	if len(message) > maxValue {
		message = message[:maxValue] + "…"
	}
	switch level {
	case "error":
		entry.Error(message)
	case "warn":
		entry.Warn(message)
	case "info":
		entry.Info(message)
	default:
		entry.Debug(message)
	}
}
