import io.spiffe.provider.SpiffeSslContextFactory;
import io.spiffe.provider.SpiffeSslContextFactory.SslContextOptions;
import io.spiffe.spiffeid.SpiffeId;
import io.spiffe.workloadapi.DefaultWorkloadApiClient;
import io.spiffe.workloadapi.DefaultX509Source;
import io.spiffe.workloadapi.Watcher;
import io.spiffe.workloadapi.X509Context;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.Set;
import javax.net.ssl.SSLSocket;

/**
 * A workload in Java with java-spiffe. It prints a line of JSON for each X509-SVID it is given and for each
 * command on standard input: "jwt AUDIENCE", or "call HOST:PORT SPIFFE-ID", which is mTLS.
 */
public class Peer {
    static synchronized void say(String name, String value) {
        System.out.println("{\"" + name + "\":\"" + value.replace("\\", "\\\\").replace("\"", "'").replace("\n", " ") + "\"}");
    }

    public static void main(String[] args) throws Exception {
        var client = DefaultWorkloadApiClient.newClient();
        var source = DefaultX509Source.newSource();
        client.watchX509Context(new Watcher<X509Context>() {
            public void onUpdate(X509Context context) {
                var svid = context.getDefaultSvid();
                synchronized (Peer.class) {
                    System.out.println("{\"x509\":\"" + svid.getSpiffeId() + "\",\"serial\":\"" + svid.getLeaf().getSerialNumber() + "\"}");
                }
            }

            public void onError(Throwable e) {
                say("error", e.toString());
            }
        });
        var in = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = in.readLine()) != null; ) {
            var words = line.split(" ");
            try {
                if (words[0].equals("jwt")) {
                    say("jwt", client.fetchJwtSvid(words[1]).getToken());
                    continue;
                }
                var id = SpiffeId.parse(words[2]);
                var context = SpiffeSslContextFactory.getSslContext(
                        SslContextOptions.builder().x509Source(source).acceptedSpiffeIdsSupplier(() -> Set.of(id)).build());
                var colon = words[1].lastIndexOf(':');
                try (var socket = (SSLSocket) context.getSocketFactory().createSocket(
                        words[1].substring(0, colon), Integer.parseInt(words[1].substring(colon + 1)))) {
                    socket.startHandshake();
                    say("heard", new BufferedReader(new InputStreamReader(socket.getInputStream())).readLine());
                }
            } catch (Exception e) {
                say("error", e.toString());
            }
        }
        System.exit(0);
    }
}
